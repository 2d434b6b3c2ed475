"""A matrix product that is added to a matrix of a wider dtype."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_ROWS_AT_ONCE = 8192
"""Rows whose product is stored at a time before it is added to a total of wider dtype."""


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` in place.

    With fp32 ``total`` and bf16 factors, CUDA's product adds to ``total`` itself, where PyTorch has it from 2.8 on;
    elsewhere the product is rounded to bf16 and added, some rows at a time.

    Args:
        total: ``[rows, columns]``, of the dtype of the factors or fp32.
        left: ``[rows, inner]``.
        right: ``[inner, columns]``.

    Source: ``out_dtype`` in https://docs.pytorch.org/docs/stable/generated/torch.addmm.html
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.dtype == torch.float32 and adds_to_wider(total.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        for rows, part in zip(torch.split(total, _ROWS_AT_ONCE), torch.split(left, _ROWS_AT_ONCE), strict=True):
            rows.add_(part @ right)


@functools.cache
def adds_to_wider(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device adds a product of ``dtype`` to an fp32 matrix in place; tried once."""
    if device.type != "cuda":
        return False
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # TypeError where addmm has no such argument
        return False
    return bool((total == 17).all())
