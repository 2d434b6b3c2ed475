"""Products of groups of rows with one matrix each: the projections of a layer's experts."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
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
    if npu.is_on_npu(rows):
        return npu.grouped_linear(rows, weights, counts.cumsum(0))
    aligned = all(size * rows.element_size() % _ALIGNMENT == 0 for size in weights.shape[1:])
    if rows.is_cuda and rows.dtype == torch.bfloat16 and aligned and _GROUPED_MM is not None:
        result: Tensor = _GROUPED_MM(rows, weights.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))
        return result
    parts = zip(torch.split(rows, counts.tolist()), weights.unbind(), strict=True)
    return torch.cat([linear(part, weight) for part, weight in parts])
