"""Causal attention of one rank's heads, by the kernel of the device."""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from mindspeed_simpo.device import npu
from mindspeed_simpo.model.blockwise import blockwise_attention


def causal_attention(
    query: Float[Tensor, "queries row heads dim"],
    key: Float[Tensor, "keys row groups dim"],
    value: Float[Tensor, "keys row groups dim"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "queries row width"]:
    """``softmax(cap(scale q k^T)) v``; the queries are the last positions of the keys, and see none after their own.

    Args:
        query: ``heads`` a multiple of ``groups``; consecutive heads share a key and a value.
        key: At least as many as the queries.
        value: As ``key``.
        scale: Of the scores, usually ``dim ** -0.5``.
        window: Keys that a query sees, its own included; None for all before it.
        softcap: ``cap(x) = softcap tanh(x / softcap)``; None leaves the scores as they are.
    """
    if window is not None and window >= key.shape[0]:
        window = None
    if npu.is_on_npu(query):
        assert softcap is None, "no operator of NPUs caps the scores: refused when the model was built"
        return npu.causal_attention(query, key, value, scale, window)
    if window is not None or softcap is not None:
        return blockwise_attention(query, key, value, scale, window, softcap)
    repeats = query.shape[2] // key.shape[2]
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    grouped = repeats > 1 and query.is_cuda
    if repeats > 1 and not grouped:
        k, v = _repeat_heads(k, repeats), _repeat_heads(v, repeats)
    square = query.shape[0] == key.shape[0]
    context = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if square else _lower_right(query, key),
        is_causal=square,
        scale=scale,
        enable_gqa=grouped,
    )
    return context.permute(2, 0, 1, 3).flatten(2)


def _repeat_heads(heads: Tensor, repeats: int) -> Tensor:
    return heads[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def _lower_right(query: Tensor, key: Tensor) -> Tensor:
    queries, keys = query.shape[0], key.shape[0]
    if query.is_cuda:
        return causal_lower_right(queries, keys)  # flash attention knows it without a mask in memory
    # a mask is kept for the backward, of every layer: parts of one tensor are kept once
    return _future(1 << (keys - 1).bit_length(), query.dtype)[keys - queries : keys, :keys]


@functools.lru_cache(16)
def _future(size: int, dtype: torch.dtype) -> Float[Tensor, "size size"]:
    """Minus infinity above the diagonal, else 0; not booleans, of which the kernel would make numbers in each call."""
    return torch.full((size, size), -math.inf, dtype=dtype).triu(1)
