"""Ascend NPUs: matrix products that are computed while their inputs or results are communicated (MC2).

The layers of tensor parallelism with sequence parallelism multiply what an all-gather gives, or reduce-scatter a
product. An operator of torch_npu does both, piece by piece, so that one hides the other. Only the communicator of the
tensor-parallel ranks is used, since a model may use such operators with one communicator only.

Source: ``npu_all_gather_base_mm`` and ``npu_mm_reduce_scatter_base`` in the documentation of Ascend Extension for
PyTorch, ``aclnnAllGatherMatmul`` and ``aclnnMatmulReduceScatter`` in that of CANN; which products have an operator
follows ``mindspeed/core/tensor_parallel/mc2_feature/linear_function.py`` of MindSpeed. None has been run on an NPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# newer versions of torch have other names for both functions
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gathered_linear(hidden: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``all_gather(hidden) weight^T`` along the first axis of ``hidden``; column-parallel under sequence parallelism.

    The backward reduce-scatters ``grad weight``. As in megatron-core, ``hidden`` is gathered again for the gradient of
    the weight, while the product of the other gradient is computed. For a frozen weight ``hidden`` is not saved.

    Args:
        hidden: fp16 or bf16 ``[seq / ranks, row, inputs]``, this rank's shard of the sequence.
        weight: ``[outputs, inputs]``, of the same dtype; both sizes within
            :data:`~mindspeed_simpo.config.validation.FUSED_AXIS`.
        group: The tensor-parallel ranks, 2, 4 or 8.

    Returns:
        ``[seq, row, outputs]``.
    """
    result: Tensor = _GatheredLinear.apply(hidden, weight, group)  # type: ignore[no-untyped-call]
    return result


def scattered_linear(hidden: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``reduce_scatter(hidden weight^T)`` along the first axis; row-parallel under sequence parallelism.

    The backward all-gathers the gradient once, for the product with the weight and for the gradient of the weight.

    Args:
        hidden: fp16 or bf16 ``[seq, row, inputs]``, ``seq`` a multiple of the number of ranks.
        weight: ``[outputs, inputs]``, see :func:`gathered_linear`.
        group: The tensor-parallel ranks, 2, 4 or 8.

    Returns:
        ``[seq / ranks, row, outputs]``, this rank's shard of the sums over ranks.
    """
    result: Tensor = _ScatteredLinear.apply(hidden, weight, group)  # type: ignore[no-untyped-call]
    return result


class _GatheredLinear(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(hidden if ctx.needs_input_grad[1] else None, weight)
        ctx.group, ctx.shape = group, hidden.shape
        output, _ = _gathered_product(hidden, weight.t(), group, keeps_gathered=False)
        return output.view(-1, hidden.shape[1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        if hidden is None:
            return _scattered_product(grad, weight, ctx.group).view(ctx.shape), None, None
        gathered = hidden.new_empty(grad.shape[0], *hidden.shape[1:])
        gather = _all_gather(gathered, hidden.contiguous(), group=ctx.group, async_op=True)
        product = grad.matmul(weight)
        hidden_grad = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        scatter = _reduce_scatter(hidden_grad, product, group=ctx.group, async_op=True)
        gather.wait()
        weight_grad = grad.flatten(0, 1).t().matmul(gathered.flatten(0, 1))
        scatter.wait()
        return hidden_grad, weight_grad, None


class _ScatteredLinear(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(hidden if ctx.needs_input_grad[1] else None, weight)
        ctx.group, ctx.shape = group, hidden.shape
        return _scattered_product(hidden, weight.t(), group).view(-1, hidden.shape[1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        hidden_grad, gathered = _gathered_product(grad, weight, ctx.group, keeps_gathered=hidden is not None)
        weight_grad = None if hidden is None else gathered.t().matmul(hidden.flatten(0, 1))
        return hidden_grad.view(ctx.shape), weight_grad, None


def _gathered_product(
    rows: Tensor, matrix: Tensor, group: dist.ProcessGroup, *, keeps_gathered: bool
) -> tuple[Tensor, Tensor]:
    """``all_gather(rows) matrix`` and the gathered rows, both of two axes; no gathered rows where not asked for."""
    import torch_npu

    result: tuple[Tensor, Tensor] = torch_npu.npu_all_gather_base_mm(
        rows.flatten(0, 1).contiguous(),
        matrix,
        _communicator(rows, group),
        group.size(),
        gather_index=0,
        gather_output=keeps_gathered,
    )
    return result


def _scattered_product(rows: Tensor, matrix: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``reduce_scatter(rows matrix)``, of two axes."""
    import torch_npu

    product: Tensor = torch_npu.npu_mm_reduce_scatter_base(
        rows.flatten(0, 1).contiguous(), matrix, _communicator(rows, group), group.size(), reduce_op="sum"
    )
    return product


def _communicator(tensor: Tensor, group: dist.ProcessGroup) -> str:
    """HCCL's name of the group's communicator, which the first call makes; asked with the rank in the world."""
    name: str = group._get_backend(tensor.device).get_hccl_comm_name(dist.get_rank())  # type: ignore[attr-defined]
    return name
