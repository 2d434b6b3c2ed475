"""Every ``torch.cuda`` call, CUDA device and NCCL group that Megatron names, on the CPU with gloo.

No tensor knows whether it would be on the NPU: ``is_cuda`` and ``is_npu`` are true of all.

Source: ``torch_npu/contrib/transfer_to_npu.py`` of Ascend pytorch.
"""

import functools

import torch

from torch_npu import hccl, npu

CPU = torch.device("cpu")
FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "as_tensor", "full_like")
FACTORIES += ("zeros_like", "ones_like", "empty_like", "rand_like", "randn_like", "linspace", "eye", "load")
DTYPES = {"Long": torch.int64, "Int": torch.int32, "Byte": torch.uint8, "Float": torch.float32}
DTYPES |= {"Half": torch.float16, "BFloat16": torch.bfloat16, "Bool": torch.bool}
DTYPES["Double"] = torch.float32  # as there: torch.cuda.DoubleTensor becomes torch.npu.FloatTensor


def _is_accelerator(device):
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    if isinstance(device, str):
        return device.startswith(("cuda", "npu"))
    return isinstance(device, torch.device) and device.type in ("cuda", "npu")


def _without_device(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        for name in ("device", "map_location"):
            if name in kwargs and _is_accelerator(kwargs[name]):
                kwargs[name] = CPU
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return call


def _to(original):
    @functools.wraps(original)
    def to(self, *args, **kwargs):
        if args and _is_accelerator(args[0]):
            args = (CPU, *args[1:])
        if _is_accelerator(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    return to


def _type(original):
    @functools.wraps(original)
    def type_(self, dtype=None, **kwargs):
        if dtype is None:
            # optimizer code compares the name with torch.cuda.*Tensor
            return original(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return original(self, dtype, **kwargs)

    return type_


class _Typed(type):
    """``torch.cuda.FloatTensor`` and its like: makes CPU tensors, and knows their instances."""

    def __call__(cls, *args):
        if len(args) == 1 and isinstance(args[0], (list, tuple)):
            return torch.tensor(args[0], dtype=cls.dtype)
        return torch.empty(*args, dtype=cls.dtype)

    def __instancecheck__(cls, value):
        return isinstance(value, torch.Tensor) and value.dtype == cls.dtype


def _gloo(original):
    @functools.wraps(original)
    def make(*args, **kwargs):
        asked = kwargs.get("backend") or next((each for each in args if isinstance(each, str)), None)
        if args and isinstance(args[0], str):
            args = ("gloo", *args[1:])
        elif "backend" in kwargs or original.__name__ == "init_process_group":
            kwargs["backend"] = "gloo"
        for name in ("pg_options", "device_id"):
            kwargs.pop(name, None)
        group = original(*args, **kwargs)
        if asked != "gloo":
            hccl.stand_for_hccl(torch.distributed.group.WORLD if group is None else group)
        return group

    return make


def _lists(original):
    # newer PyTorch takes the splits of all_to_all_single as lists only
    @functools.wraps(original)
    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, **kwargs):
        splits = [None if s is None else [int(n) for n in s] for s in (output_split_sizes, input_split_sizes)]
        return original(output, input, *splits, **kwargs)

    return all_to_all_single


def _without_capability(original):
    # PyTorch after 2.7.1 asks for that of the tensor's device, which MindSpeed 2's replacement does not take
    @functools.wraps(original)
    def broadcast(*args, **kwargs):
        replaced = torch.cuda.get_device_capability
        torch.cuda.get_device_capability = lambda _=None: replaced()
        try:
            return original(*args, **kwargs)
        finally:
            torch.cuda.get_device_capability = replaced

    return broadcast


def _keep_the_sent_alive():
    # gloo reads the buffer after isend returns, and Megatron empties a pipeline output as soon as it was sent
    posted = []

    def keep(original):
        @functools.wraps(original)
        def call(tensor, *args, **kwargs):
            tensor = tensor.detach().clone()
            work = original(tensor, *args, **kwargs)
            posted[:] = [(w, t) for w, t in posted if not w.is_completed()]
            posted.append((work, tensor))
            return work

        return call

    def batch(ops):
        for op in ops:
            if op.op is torch.distributed.isend:
                op.tensor = op.tensor.detach().clone()
        works = batch_isend_irecv(ops)
        posted.extend(zip(works, [op.tensor for op in ops], strict=False))
        return works

    batch_isend_irecv = torch.distributed.batch_isend_irecv
    # PyTorch checks the operation of a batch against this name
    torch.distributed.isend = torch.distributed.distributed_c10d.isend = keep(torch.distributed.isend)
    torch.distributed.batch_isend_irecv = batch


def _redirect():
    for name in FACTORIES:
        setattr(torch, name, _without_device(getattr(torch, name)))
    for owner in (torch.Tensor, torch.nn.Module):
        owner.to = _to(owner.to)
        owner.cuda = owner.npu = lambda self, *args, **kwargs: self
    for name in ("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"):
        setattr(torch.Tensor, name, _without_device(getattr(torch.Tensor, name)))
    torch.Tensor.type = _type(torch.Tensor.type)
    torch.Tensor.pin_memory = lambda self, device=None: self.clone()  # a copy in other memory
    torch.Tensor.is_cuda = torch.Tensor.is_npu = property(lambda _: True)
    torch.Tensor.record_stream = lambda self, stream: None
    for name in vars(npu):
        if not name.startswith("__"):
            setattr(torch.cuda, name, getattr(npu, name))
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda.random, name, getattr(npu, name))
    for name, dtype in DTYPES.items():
        setattr(torch.cuda, f"{name}Tensor", _Typed(f"{name}Tensor", (), {"dtype": dtype}))
    torch.cuda.get_device_capability = lambda device=None: (8, 0)
    hccl.install()
    for name in ("init_process_group", "new_group"):
        setattr(torch.distributed, name, _gloo(getattr(torch.distributed, name)))
    torch.distributed.all_to_all_single = _lists(torch.distributed.all_to_all_single)
    broadcast = _without_capability(torch.distributed.broadcast)
    torch.distributed.broadcast = torch.distributed.distributed_c10d.broadcast = broadcast
    torch.distributed.is_nccl_available = lambda: True
    loader_init = torch.utils.data.DataLoader.__init__
    torch.utils.data.DataLoader.__init__ = lambda self, *args, **kwargs: loader_init(
        self, *args, **{**kwargs, "pin_memory": False}
    )
    _keep_the_sent_alive()


_redirect()
