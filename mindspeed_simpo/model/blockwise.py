"""Causal attention with a sliding window, a soft cap or sinks, in blocks of queries that read only visible keys.

Mask and scores exist for one block at a time, never for the whole row. The backward recomputes each block from the
queries, keys and values, the only tensors saved for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention

_SMALLEST_BLOCK, _LARGEST_BLOCK = 128, 1024
_WIDER = 8
"""Elements by which heads with a sink are wider: the kernels of GPUs take multiples of 8."""


def blockwise_attention(
    query: Float[Tensor, "queries row heads dim"],
    key: Float[Tensor, "keys row groups dim"],
    value: Float[Tensor, "keys row groups dim"],
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "queries row width"]:
    """``softmax(cap(scale q k^T)) v`` as :func:`~mindspeed_simpo.model.causal.causal_attention`; on CPUs and GPUs.

    Args:
        query: Queries at the last positions of the keys; ``heads`` is a multiple of ``groups``.
        key: At least as many keys as queries.
        value: One value per key.
        scale: Factor of the scores.
        window: Number of keys that a query attends to, its own included; None for all earlier ones.
        softcap: ``cap(x) = softcap tanh(x / softcap)``, computed in at least fp32; None for no cap, computed by torch's
            ``scaled_dot_product_attention``.
        sinks: Score of one more key of each query head, whose value is zero; not together with ``softcap``. None for
            none. The gradient sums over blocks in the dtype of the sinks.

    Returns:
        The context of all heads, ``width = heads dim``, in the dtype of ``query``.
    """
    context: Tensor = _Blockwise.apply(query, key, value, sinks, scale, window, softcap)  # type: ignore[no-untyped-call]
    return context.flatten(2)


class _Blockwise(Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, sinks)
        ctx.variants = scale, window, softcap
        context = torch.empty_like(query, memory_format=torch.contiguous_format)
        for block in _blocks(query.shape[0], key.shape[0], window, softcap):
            context[block.queries] = _attend(
                query[block.queries], key[block.keys], value[block.keys], sinks, scale, window, softcap
            )
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks = ctx.saved_tensors
        scale, window, softcap = ctx.variants
        grads = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        sinks_grad = None if sinks is None else torch.zeros_like(sinks)
        for block in _blocks(query.shape[0], key.shape[0], window, softcap):
            parts = query[block.queries], key[block.keys], value[block.keys]
            with torch.enable_grad():
                q, k, v = (part.detach().requires_grad_() for part in parts)
                own_sinks = None if sinks is None else sinks.detach().requires_grad_()
                context = _attend(q, k, v, own_sinks, scale, window, softcap)
            inputs = (q, k, v) if own_sinks is None else (q, k, v, own_sinks)
            q_grad, k_grad, v_grad, *rest = torch.autograd.grad(context, inputs, grad[block.queries])
            grads[0][block.queries] = q_grad
            grads[1][block.keys] += k_grad
            grads[2][block.keys] += v_grad
            if sinks_grad is not None:
                sinks_grad += rest[0]
        return *grads, sinks_grad, None, None, None


class _Block(NamedTuple):
    queries: slice
    keys: slice


def _blocks(queries: int, keys: int, window: int | None, softcap: float | None) -> Iterator[_Block]:
    size = block_size(window, softcap)
    before = keys - queries
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        first = 0 if window is None else max(0, before + start - window + 1)
        yield _Block(slice(start, stop), slice(first, before + stop))


def block_size(window: int | None, softcap: float | None) -> int:
    """Queries per block: few where scores are materialised, else one window, so that at most half is masked out."""
    if softcap is not None or window is None:
        return _SMALLEST_BLOCK
    return min(max(window, _SMALLEST_BLOCK), _LARGEST_BLOCK)


def _attend(
    query: Float[Tensor, "queries row heads dim"],
    key: Float[Tensor, "keys row groups dim"],
    value: Float[Tensor, "keys row groups dim"],
    sinks: Float[Tensor, " heads"] | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Float[Tensor, "queries row heads dim"]:
    """Attention of one block: keys from the window of the first query to the position of the last query."""
    repeats = query.shape[2] // key.shape[2]
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    mask_dtype = query.dtype if softcap is None else wide
    size = block_size(window, softcap)
    mask = _mask(size, window, mask_dtype, query.device, query.shape[0], key.shape[0])
    if softcap is None:
        # no kernel of CUDA takes both a mask and shared key-value heads without dense scores
        k, v = repeat_heads(k, repeats), repeat_heads(v, repeats)
        if sinks is not None:
            q, k, v = _with_sinks(q, k, v, sinks / scale)
            mask = pad(mask, (1, 0))
        context = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[..., : query.shape[3]]
    else:
        assert sinks is None, "no family has both a soft cap and sinks"
        q = q.reshape(q.shape[0], -1, repeats, *q.shape[2:]).to(wide)
        scores = q @ k[:, :, None].to(wide).transpose(-1, -2) * (scale / softcap)
        weights = torch.softmax(scores.tanh() * softcap + mask, dim=-1)
        context = (weights @ v[:, :, None].to(wide)).to(query.dtype).flatten(1, 2)
    return context.permute(2, 0, 1, 3)


def _with_sinks(
    query: Float[Tensor, "row heads queries dim"],
    key: Float[Tensor, "row heads keys dim"],
    value: Float[Tensor, "row heads keys dim"],
    scores: Float[Tensor, " heads"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Wider heads, with one more key in front that has the same score for every query of a head, and the value zero.

    The score is ``1 high + 1 low`` of further elements: ``low`` is what the dtype of the key cannot hold of ``high``.
    """
    high = scores.to(key.dtype)
    low = (scores - high).detach().to(key.dtype)
    sink = pad(torch.stack((high, low), dim=-1), (key.shape[3], _WIDER - 2))
    keys = torch.cat((sink[None, :, None].expand(key.shape[0], -1, -1, -1), pad(key, (0, _WIDER))), dim=2)
    return pad(pad(query, (0, 2), value=1.0), (0, _WIDER - 2)), keys, pad(value, (0, _WIDER, 1, 0))


def repeat_heads(heads: Float[Tensor, "row groups seq dim"], repeats: int) -> Float[Tensor, "row heads seq dim"]:
    """Each key-value head ``repeats`` times in succession; the same tensor for 1."""
    return heads if repeats == 1 else heads.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def _mask(
    size: int, window: int | None, dtype: torch.dtype, device: torch.device, queries: int, keys: int
) -> Float[Tensor, "queries keys"]:
    """Additive mask: 0 where a query may attend to a key, else minus infinity; the last query is at the last key."""
    if window is not None:
        return _band_mask(size, window, dtype, device)[-queries:, -keys:]
    triangle = _band_mask(size, size, dtype, device)[-queries:, -queries:]
    return pad(triangle, (keys - queries, 0))


@functools.lru_cache(32)
def _band_mask(size: int, window: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "size keys"]:
    """Additive mask of ``size`` queries over ``size + window - 1`` keys: a band of ``window`` zeros per query."""
    hidden = torch.full((size, size + window - 1), -math.inf, dtype=dtype, device=device)
    return hidden.triu(window) + hidden.tril(-1)
