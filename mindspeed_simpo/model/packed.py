"""Attention of a packed row: every document to itself and to its prefix, by the kernel of the device."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mindspeed_simpo.batch import Documents, to_device
from mindspeed_simpo.device import npu
from mindspeed_simpo.model.causal import causal_attention


def packed_attention(
    query: Float[Tensor, "seq 1 heads dim"],
    key: Float[Tensor, "seq 1 groups dim"],
    value: Float[Tensor, "seq 1 groups dim"],
    documents: Documents,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "seq 1 width"]:
    """``softmax(cap(scale q k^T)) v`` within each document; two calls, whatever the number of documents.

    The first has the documents that attend to themselves, queries and keys alike. The second has the branches: queries
    of a branch over the keys of its prefix and its own, causal, so that the last query sees the last key. No mask of
    the row exists.

    Args:
        query: ``heads`` a multiple of ``groups``; consecutive heads share a key and a value.
        key: See ``query``.
        value: See ``query``.
        documents: What the row is made of; their lengths add up to ``seq``.
        scale: Of the scores, usually ``dim ** -0.5``.
        window: Keys of its sequence that a query sees, its own included; None for all before it.
        softcap: See :func:`~mindspeed_simpo.model.causal.causal_attention`.
    """
    end = sum(documents.wholes)
    own = key[:end], value[:end]
    context = attend_apart(query[:end], *own, documents.wholes, documents.wholes, scale, window, softcap)
    if not documents.branches:
        return context
    seen = _branch_keys(documents, key.device)
    lengths = [branch.length for branch in documents.branches]
    key_lengths = [branch.prefix_length + branch.length for branch in documents.branches]
    keys, values = key.index_select(0, seen), value.index_select(0, seen)
    branches = attend_apart(query[end:], keys, values, lengths, key_lengths, scale, window, softcap)
    return torch.cat([context, branches])


def attend_apart(
    query: Float[Tensor, "queries 1 heads dim"],
    key: Float[Tensor, "keys 1 groups dim"],
    value: Float[Tensor, "keys 1 groups dim"],
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "queries 1 width"]:
    """Causal attention of many documents that lie end to end; the queries of each are the last positions of its keys.

    Args:
        query: All documents' queries.
        key: All documents' keys; ``value`` likewise.
        value: See ``key``.
        query_lengths: Queries of each document.
        key_lengths: Keys of each document, at least as many.
        scale: Of the scores.
        window: See :func:`packed_attention`.
        softcap: See :func:`packed_attention`.
    """
    if window is not None and window >= max(key_lengths, default=0):
        window = None
    if npu.is_on_npu(query):
        assert softcap is None, "no operator of NPUs caps the scores: refused when the model was built"
        return npu.varlen_attention(query, key, value, query_lengths, key_lengths, scale, window)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and _has_flash_attention():
        return flash_attention(query, key, value, query_lengths, key_lengths, scale, window, softcap)
    # torch.split, not slices: the gradient of each slice would be as long as the row
    queries, keys, values = (
        torch.split(tensor, list(lengths))
        for tensor, lengths in ((query, query_lengths), (key, key_lengths), (value, key_lengths))
    )
    parts = zip(queries, keys, values, strict=True)
    return torch.cat([causal_attention(*part, scale, window, softcap) for part in parts])


def flash_attention(
    query: Float[Tensor, "queries 1 heads dim"],
    key: Float[Tensor, "keys 1 groups dim"],
    value: Float[Tensor, "keys 1 groups dim"],
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "queries 1 width"]:
    """:func:`attend_apart` by the flash-attn package, whose causal mask is aligned to the last query and key."""
    from flash_attn import flash_attn_varlen_func

    context: Tensor = flash_attn_varlen_func(
        query[:, 0],
        key[:, 0],
        value[:, 0],
        _bounds(tuple(query_lengths), query.device),
        _bounds(tuple(key_lengths), query.device),
        max(query_lengths),
        max(key_lengths),
        softmax_scale=scale,
        causal=True,
        **({} if window is None else {"window_size": (window - 1, 0)}),
        **({} if softcap is None else {"softcap": softcap}),
    )
    return context.flatten(1)[:, None]


@functools.cache
def _has_flash_attention() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


# What follows is the same for all layers of a micro-batch, and copied to the device once

_MICRO_BATCHES_IN_FLIGHT = 64


@functools.lru_cache(_MICRO_BATCHES_IN_FLIGHT)
def _branch_keys(documents: Documents, device: torch.device) -> Int[Tensor, " key"]:
    """Where in the row the keys of each branch lie: those of its prefix, then its own."""
    parts, start = [], sum(documents.wholes)
    for branch in documents.branches:
        parts.append(torch.arange(branch.prefix_start, branch.prefix_start + branch.prefix_length))
        parts.append(torch.arange(start, start + branch.length))
        start += branch.length
    return to_device(torch.cat(parts), device)


@functools.lru_cache(_MICRO_BATCHES_IN_FLIGHT)
def document_lengths(documents: Documents, device: torch.device) -> Int[Tensor, " seq"]:
    """For each position of a packed row how many tokens its sequence has; a branch's prefix counts for the branch."""
    wholes = [torch.full((length,), length) for length in documents.wholes]
    branches = [torch.full((each.length,), each.prefix_length + each.length) for each in documents.branches]
    return to_device(torch.cat([*wholes, *branches]), device)


@functools.lru_cache(_MICRO_BATCHES_IN_FLIGHT)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Int[Tensor, " bound"]:
    """Where each document begins, and where the last one ends."""
    return to_device(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), device)
