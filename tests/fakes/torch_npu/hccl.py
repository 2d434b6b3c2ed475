"""What HCCL refuses, in front of the gloo groups that stand for HCCL's: dtypes, strides and operations.

Source: ``torch_npu/csrc/distributed/ProcessGroupHCCL.cpp`` and ``HCCLUtils.cpp`` of Ascend pytorch, for chips before
the Ascend 950. The methods of a group have the names that they have there.
"""

import functools

import torch
from torch.distributed import ProcessGroup, ReduceOp

REDUCED = (torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32)
"""``checkSupportedDataType``: what HCCL adds."""
CAST = (torch.bool, torch.uint8)
"""``allreduce`` and ``reduce`` add these as int32 and cast the result back; ``reduce_scatter`` does not."""
SENT = (*REDUCED, *CAST, torch.uint16, torch.uint32, torch.uint64, torch.float64, torch.float8_e4m3fn)
SENT = (*SENT, torch.float8_e5m2)
"""``kScalarTypeToHcclDataType``: what HCCL copies between ranks."""

_REDUCTIONS = ("allreduce", "allreduce_coalesced", "reduce", "reduce_scatter", "_reduce_scatter_base")
_REDUCTIONS += ("reduce_scatter_tensor_coalesced", "reduce_scatter_single", "reduce_scatter_single_coalesced")
_COPIES = ("broadcast", "allgather", "_allgather_base", "allgather_into_tensor_coalesced", "scatter", "send", "recv")
_COPIES += ("alltoall_base", "alltoall", "all_gather_single", "all_gather_single_coalesced", "all_to_all_single")
_ABSENT = ("gather", "recv_anysource")
METHODS = (*_REDUCTIONS, *_COPIES, *_ABSENT)
_LISTS = {"allgather": 0, "reduce_scatter": 1, "scatter": 1}
"""Arguments that are lists of tensors for one rank: these need no strides of their own, for HCCL flattens them."""
_BITWISE = (ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR)
_groups = set()
communicators = {}
"""Name of a communicator -> its group, once :meth:`Backend.get_hccl_comm_name` has told the name."""


def stand_for_hccl(group):
    """From now on this group refuses what HCCL's refuses; returns the group."""
    if group is not None and not isinstance(group, int):
        _groups.add(group.group_name)
    return group


def install():
    """Let every group refuse that is HCCL's (:func:`stand_for_hccl`); a second call has no effect."""
    for names, check in ((_REDUCTIONS, _check_reduction), (_COPIES, _check_copy), (_ABSENT, _refuse)):
        for name in names:
            method = getattr(ProcessGroup, name, None)
            if method is not None and not hasattr(method, "checked"):
                setattr(ProcessGroup, name, _checked(name, method, check))


def make_groups():
    """The world and new groups without a backend of their own are HCCL's from now on; gloo asked for stays gloo."""
    distributed = torch.distributed
    install()
    if distributed.is_initialized():
        stand_for_hccl(distributed.group.WORLD)
    if not hasattr(distributed.new_group, "checked"):
        distributed.new_group = _watched(distributed.new_group)
    if not hasattr(ProcessGroup._get_backend, "checked"):
        ProcessGroup._get_backend = _named(ProcessGroup._get_backend)


class Backend:
    """The backend of a group that is HCCL's: gloo's, and HCCL's name of the communicator.

    Source: the page of ``get_hccl_comm_name`` in the documentation of Ascend Extension for PyTorch, for the rank, which
    is that in the world.
    """

    def __init__(self, group, backend):
        self._group, self._backend = group, backend

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def get_hccl_comm_name(self, rankid, init_comm=True):
        if rankid != torch.distributed.get_rank():
            raise RuntimeError(f"get_hccl_comm_name: expected this process' rank in the world, found {rankid}")
        name = f"communicator of {self._group.group_name}"
        if init_comm:
            communicators[name] = self._group
        return name if name in communicators else ""


def _named(get_backend):
    @functools.wraps(get_backend)
    def get(group, device):
        backend = get_backend(group, device)
        return Backend(group, backend) if group.group_name in _groups else backend

    get.checked = True
    return get


def _watched(new_group):
    @functools.wraps(new_group)
    def make(*args, backend=None, **kwargs):
        group = new_group(*args, backend=backend, **kwargs)
        return group if backend == "gloo" else stand_for_hccl(group)

    make.checked = True
    return make


def _checked(name, method, check):
    @functools.wraps(method)
    def call(group, *args, **kwargs):
        if group.group_name not in _groups:
            return method(group, *args, **kwargs)
        for index, argument in enumerate(args):
            for tensor in _tensors(argument):
                _check_strides(name, tensor, flattened=_LISTS.get(name) == index)
                check(name, tensor)
        if name in _REDUCTIONS:
            _check_operation(name, args)
        if name in ("allreduce", "reduce"):
            return _reduced(method, group, *args, **kwargs)
        if name in _UNEVEN and len({tensor.shape for tensor in args[_LISTS[name]][0]}) > 1:
            return _UNEVEN[name](group, *args[:2])
        return method(group, *args, **kwargs)

    call.checked = True
    return call


def _tensors(argument):
    if isinstance(argument, torch.Tensor):
        return [argument]
    if isinstance(argument, list | tuple):
        return [tensor for each in argument for tensor in _tensors(each)]
    return []


def _check_strides(name, tensor, *, flattened):
    """``check_npu_tensors_different_devices``, ``check_npu_tensors_same_device`` and ``check_npu_single_tensor``."""
    if tensor.is_sparse:
        raise RuntimeError(f"HCCL {name}: Tensors must be NPU and dense")
    if flattened:
        if not tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True)).is_contiguous():
            raise RuntimeError(f"HCCL {name}: Tensors must be non-overlapping and dense, found {tensor.stride()}")
    elif not tensor.is_contiguous():
        raise RuntimeError(f"HCCL {name}: Tensors must be contiguous, found strides {tensor.stride()}")


def _check_copy(name, tensor):
    """``getHcclDataType``; ``alltoall_base`` also refuses tensors without an axis."""
    if tensor.dtype not in SENT:
        raise RuntimeError(f"HCCL {name}: Unsupported data type for HCCL process group, found {tensor.dtype}")
    if name in ("alltoall_base", "all_to_all_single") and tensor.dim() == 0:
        raise RuntimeError("HCCL alltoall: Scalar tensors (0-dim tensors) are not supported in alltoall")


def _check_reduction(name, tensor):
    """``checkSupportedDataType``, which sees bool and uint8 of ``allreduce`` and ``reduce`` as int32."""
    cast = CAST if name in ("allreduce", "allreduce_coalesced", "reduce") else ()
    if tensor.dtype not in (*REDUCED, *cast):
        raise RuntimeError(f"HCCL {name}: Unsupported data type {tensor.dtype}")


def _refuse(name, _):
    """``gather`` and ``recvAnysource`` throw."""
    raise RuntimeError(f"ProcessGroupHCCL does not support {name}")


def _check_operation(name, args):
    """``getHcclReduceOp``: no bitwise operations."""
    for argument in args:
        operation = getattr(argument, "reduceOp", None)
        # ReduceOp equals its kinds from the left side only
        if operation is not None and any(operation == each for each in _BITWISE):
            raise RuntimeError(f"HCCL {name}: Cannot use a bitwise ReduceOp with HCCL")


def _reduced(method, group, tensors, *args, **kwargs):
    narrow = tensors if isinstance(tensors, torch.Tensor) else tensors[0]
    if narrow.dtype not in CAST:
        return method(group, tensors, *args, **kwargs)
    wide = narrow.to(torch.int32)
    work = method(group, [wide], *args, **kwargs)
    work.wait()
    narrow.copy_(wide)
    return work


def _gathered_unevenly(group, outputs, inputs):
    """``HcclAllGatherV``, which takes tensors of several sizes; gloo's gather takes one size."""
    [outputs], [own] = outputs, inputs
    for rank, output in enumerate(outputs):
        if rank == group.rank():
            output.copy_(own)
        options = torch.distributed.BroadcastOptions()
        options.rootRank = rank
        work = group.broadcast([output], options)
        work.wait()
    return work


def _scattered_unevenly(group, outputs, inputs):
    """``HcclReduceScatterV``: the sums of tensors of several sizes, one to each rank."""
    [own], [inputs] = outputs, inputs
    total = torch.cat([tensor.flatten() for tensor in inputs])
    work = group.allreduce([total])
    work.wait()
    own.copy_(torch.split(total, [tensor.numel() for tensor in inputs])[group.rank()].view_as(own))
    return work


_UNEVEN = {"allgather": _gathered_unevenly, "reduce_scatter": _scattered_unevenly}
