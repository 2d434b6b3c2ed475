"""The elementwise operations and sums on the logits of a chunk of tokens, as functions of tensors.

Operator by operator they write to the logits in place. On CUDA :mod:`mindspeed_simpo.device.compiled` makes one kernel
of each, or a few, which read the products in their dtype; no fp32 logits are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_terms(logits: Tensor, column: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The terms of the softmax on this rank's shard.

    Args:
        logits: fp32 or fp64 ``[token, shard]``.
        column: int64 ``[token, 1]`` column of the token's target; any column where another shard has the target.
        out: Buffer of the exponentials; may be ``logits``.

    Returns:
        ``exp(logits - local_max)``, and ``[3, token]``: for each token ``local_max``, the sum of the exponentials and
        the logit in ``column``.
    """
    # in a shard of padding ids only, every logit is minus infinity
    local_max = logits.amax(dim=-1).clamp_(min=torch.finfo(logits.dtype).min)
    target_logit = logits.gather(-1, column)[:, 0]
    exponentials = torch.sub(logits, local_max[:, None], out=out).exp_()
    return exponentials, torch.stack([local_max, exponentials.sum(dim=-1), target_logit])


def chunk_terms(products: Tensor, column: Tensor, softcap: float | None, existing: int | None) -> Tensor:
    """The second result of :func:`softmax_terms`, of capped fp32 logits.

    Args:
        products: ``[token, shard]`` logits before the softcap; in fp32 overwritten.
        column: See :func:`softmax_terms`.
        softcap: Soft cap of the logits; None for none.
        existing: Number of columns that are not padding; None for all.
    """
    logits = _capped(products.float(), softcap, existing)
    return softmax_terms(logits, column, out=logits)[1]


def chunk_grads(
    products: Tensor,
    column: Tensor,
    mask: Tensor,
    local_max: Tensor,
    scale: Tensor,
    grad: Tensor,
    softcap: float | None,
    existing: int | None,
) -> Tensor:
    """The gradient of ``products``: ``grad (onehot - softmax)`` times the slope of the softcap, in their dtype.

    Args:
        products: As in :func:`chunk_terms`.
        column: See :func:`softmax_terms`.
        mask: bool ``[token]``, whether the shard has the token's target.
        local_max: From :func:`softmax_terms`.
        scale: fp32 ``[token]``, for which ``scale exp(logits - local_max)`` are the probabilities.
        grad: fp32 ``[token]`` gradient of the log-probabilities.
        softcap: As in :func:`chunk_terms`.
        existing: As in :func:`chunk_terms`.
    """
    logits = products.float()
    slope = logits.clone() if softcap is not None else None
    grads = _capped(logits, softcap, existing).sub_(local_max[:, None]).exp_().mul_((-grad * scale)[:, None])
    of_target = grads.gather(-1, column).add_((grad * mask)[:, None])
    if slope is not None and softcap is not None:
        # d cap(z) / d z = 1 - tanh(z / softcap)^2
        slope.div_(softcap).tanh_().square_().neg_().add_(1)
        of_target.mul_(slope.gather(-1, column))
        grads.mul_(slope)
    return grads.to(products.dtype).scatter_(-1, column, of_target.to(products.dtype))


def _capped(logits: Tensor, softcap: float | None, existing: int | None) -> Tensor:
    """``softcap tanh(logits / softcap)`` in place, minus infinity in the columns of padding."""
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if existing is not None:
        logits[:, existing:] = float("-inf")
    return logits
