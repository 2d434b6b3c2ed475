"""Products of groups of rows with one matrix each, and sums with one vector each: the projections of experts."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from mindspeed_simpo.device import npu

# newer versions of torch have a public name for it
_GROUPED_MM: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
_ALIGNMENT = 16
"""Bytes of which the rows of all matrices of torch's grouped product must be a multiple."""


def grouped_linear(
    rows: Float[Tensor, "row in_"], weights: Float[Tensor, "group out in_"], counts: Int[Tensor, " group"]
) -> Float[Tensor, "row out"]:
    """``rows_g weights_g^T`` for each group ``g`` of consecutive rows.

    Args:
        rows: The rows of all groups, group after group.
        weights: The matrix of each group.
        counts: int64 number of rows of each group, 0 or more, whose sum is the number of rows.
    """
    if len(weights) == 1:
        return linear(rows, weights[0])
    if npu.is_on_npu(rows):
        return npu.grouped_linear(rows, weights, counts.cumsum(0))
    aligned = all(size * rows.element_size() % _ALIGNMENT == 0 for size in weights.shape[1:])
    if rows.is_cuda and rows.dtype == torch.bfloat16 and aligned and _GROUPED_MM is not None:
        result: Tensor = _GROUPED_MM(rows, weights.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))
        return result
    parts = zip(torch.split(rows, counts.tolist()), weights.unbind(), strict=True)
    return torch.cat([linear(part, weight) for part, weight in parts])


class _GroupedBias(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, biases: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(counts)
        return rows + biases.repeat_interleave(counts, dim=0, output_size=len(rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (counts,) = ctx.saved_tensors
        stops = counts.cumsum(0)[:, None]
        row = torch.arange(len(grad), device=grad.device)
        # rows are summed by a product, in one order, where the backward of an index would add by atomic operations
        belongs = (row < stops) & (row >= stops - counts[:, None])
        return grad, belongs.to(grad.dtype) @ grad, None


def grouped_bias(
    rows: Float[Tensor, "row out"], biases: Float[Tensor, "group out"], counts: Int[Tensor, " group"]
) -> Float[Tensor, "row out"]:
    """``rows_g + bias_g`` for each group ``g`` of consecutive rows.

    Args:
        rows: The rows of all groups, group after group.
        biases: The vector of each group.
        counts: int64 number of rows of each group, 0 or more, whose sum is the number of rows.
    """
    result: Tensor = _GroupedBias.apply(rows, biases, counts)  # type: ignore[no-untyped-call]
    return result
