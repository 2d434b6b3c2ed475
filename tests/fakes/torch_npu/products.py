"""Matrix products with communication inside (MC2), by a product and a collective of the group behind the name.

Source, beside those in the docstrings: op-plugin, ``op_plugin/ops/opapi/AllGatherBaseMatmulKernelNpuOpApi.cpp`` and
``MatmulReduceScatterBaseKernelNpuOpApi.cpp``; CANN ops-transformer, ``mc2/all_gather_matmul/docs/
aclnnAllGatherMatmul.md`` and ``mc2/matmul_reduce_scatter/docs/aclnnMatmulReduceScatter.md``. Where these differ, the
narrower one counts.
"""

import torch

from torch_npu import hccl
from torch_npu.refusals import require

RANKS = (2, 4, 8)
"""Of the Atlas A2; the A3 takes 16 and 32, too, but MindSpeed's ``docs/zh/features/mc2.md`` excludes the A3."""
SUMMED = range(256, 65535)
DTYPES = (torch.float16, torch.bfloat16)
_names = set()


@torch.no_grad()
def npu_all_gather_base_mm(x1, x2, hcom, world_size, bias=None, gather_index=0, gather_output=True, comm_turn=0):
    """``(all_gather(x1) @ x2, all_gather(x1))``; the second is empty without ``gather_output``.

    Source: ``docs/zh/custom_APIs/torch_npu/torch_npu-npu_all_gather_base_mm.md`` of op-plugin.
    """
    name = "npu_all_gather_base_mm"
    group = _check(name, x1, x2, hcom, world_size, bias, comm_turn)
    require(gather_index == 0, name, "gather_index 0", gather_index)
    gathered = x1.new_empty(world_size * len(x1), x1.shape[1])
    torch.distributed.all_gather_into_tensor(gathered, x1, group=group)
    return gathered @ x2, gathered if gather_output else x1.new_empty(0)


@torch.no_grad()
def npu_mm_reduce_scatter_base(x1, x2, hcom, world_size, *, reduce_op="sum", bias=None, comm_turn=0):
    """``reduce_scatter(x1 @ x2)``.

    Source: ``docs/zh/custom_APIs/torch_npu/torch_npu-npu_mm_reduce_scatter_base.md`` of op-plugin.
    """
    name = "npu_mm_reduce_scatter_base"
    group = _check(name, x1, x2, hcom, world_size, bias, comm_turn)
    require(reduce_op == "sum", name, "reduce_op sum", reduce_op)
    require(len(x1) % world_size == 0, name, f"rows that {world_size} ranks divide", tuple(x1.shape))
    product = x1 @ x2
    result = product.new_empty(len(product) // world_size, product.shape[1])
    torch.distributed.reduce_scatter_tensor(result, product, group=group)
    return result


def _check(name, x1, x2, hcom, world_size, bias, comm_turn):
    """What both refuse; returns the group. All such operators of a model share one communicator on the Atlas A2."""
    shapes, dtypes = (tuple(x1.shape), tuple(x2.shape)), (x1.dtype, x2.dtype)
    require(dtypes[0] in DTYPES and dtypes[0] == dtypes[1], name, "fp16 or bf16, of both inputs", dtypes)
    require(x1.dim() == x2.dim() == 2, name, "inputs of 2 axes", shapes)
    require(x1.numel() and x2.numel(), name, "inputs that are not empty", shapes)
    require(shapes[0][1] == shapes[1][0], name, "one summed axis", shapes)
    require(shapes[0][1] in SUMMED, name, "256 to 65534 elements of the summed axis", shapes)
    require(x1.is_contiguous(), name, "a contiguous left input", f"strides {x1.stride()}")
    whole = x2.is_contiguous() or x2.t().is_contiguous()
    require(whole, name, "a contiguous right input, or its transpose", f"strides {x2.stride()}")
    require(bias is None, name, "no bias", bias)
    require(comm_turn == 0, name, "comm_turn 0", comm_turn)
    require(hcom in hccl.communicators, name, "a name from get_hccl_comm_name", hcom)
    group = hccl.communicators[hcom]
    require(world_size in RANKS and world_size == group.size(), name, "the group's 2, 4 or 8 ranks", world_size)
    _names.add(hcom)
    require(len(_names) == 1, name, "one communicator for all operators of this kind", sorted(_names))
    return group
