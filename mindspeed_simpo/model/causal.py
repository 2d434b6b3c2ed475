"""Causal attention of unpacked rows, by the fastest kernel of the device."""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from mindspeed_simpo.device import cuda, npu
from mindspeed_simpo.model.blockwise import blockwise_attention, repeat_heads
from mindspeed_simpo.model.kernels import chosen_kernel
from mindspeed_simpo.model.visible import causal_mask

LARGEST_MASK = 2048
"""Keys up to which CPUs mask queries at the last positions of more keys by one cached mask; beyond, block by block."""


def causal_attention(
    query: Float[Tensor, "queries row heads dim"],
    key: Float[Tensor, "keys row groups dim"],
    value: Float[Tensor, "keys row groups dim"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "queries row width"]:
    """``softmax(cap(scale q k^T)) v``, causal: the queries have the last positions of the keys.

    Args:
        query: ``heads`` is a multiple of ``groups``; consecutive query heads share a key-value head.
        key: At least as many keys as queries.
        value: One value per key.
        scale: Factor of the scores, usually ``dim ** -0.5``.
        window: Number of keys that a query attends to, its own included; None for all earlier ones.
        softcap: ``cap(x) = softcap tanh(x / softcap)``; None for no cap. NPUs have no operator with a cap.
        sinks: Of each query head, the score of one more key whose value is zero; None for none.

    Returns:
        The context of all heads, ``width = heads dim``, in the dtype of ``query``.
    """
    if window is not None and window >= key.shape[0]:
        window = None
    kernel = chosen_kernel(query, packed=False, window=window, softcap=softcap, sinks=sinks)
    if kernel == "npu_fusion_attention":
        assert softcap is None, "no operator of NPUs caps the scores: refused when the model was built"
        return npu.causal_attention(query, key, value, scale, window, sinks)
    if kernel == "flex_attention":
        mask = causal_mask(query.shape[0], key.shape[0], window, query.device)
        return cuda.flex_attention(query, key, value, mask, scale, softcap, sinks)
    square = query.shape[0] == key.shape[0]
    masked = not square and not query.is_cuda
    if kernel == "blockwise_attention" or (masked and key.shape[0] > LARGEST_MASK):
        return blockwise_attention(query, key, value, scale, window, softcap, sinks)
    repeats = query.shape[2] // key.shape[2]
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    # of CUDA's kernels without dense scores only flash attention shares key-value heads, and only in half precision
    grouped = repeats > 1 and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    if not grouped:
        k, v = repeat_heads(k, repeats), repeat_heads(v, repeats)
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


def _lower_right(query: Tensor, key: Tensor) -> Tensor:
    queries, keys = query.shape[0], key.shape[0]
    if query.is_cuda:
        return causal_lower_right(queries, keys)  # flash attention applies this bias without a mask in memory
    # autograd saves the mask of every layer: slices of one cached tensor share its memory
    return _causal_mask(1 << (keys - 1).bit_length(), query.dtype)[keys - queries : keys, :keys]


@functools.lru_cache(16)
def _causal_mask(size: int, dtype: torch.dtype) -> Float[Tensor, "size size"]:
    """Additive causal mask: minus infinity above the diagonal, else 0.

    The mask is not boolean, because the kernel would convert a boolean mask to numbers in each call.
    """
    return torch.full((size, size), -math.inf, dtype=dtype).triu(1)
