"""Attention of a packed row: every document to itself and to its prefix, by the kernel of the device."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mindspeed_simpo.batch import Documents, moved
from mindspeed_simpo.device import npu
from mindspeed_simpo.model.causal import causal_attention


def packed_attention(
    query: Float[Tensor, "seq 1 heads dim"],
    key: Float[Tensor, "seq 1 groups dim"],
    value: Float[Tensor, "seq 1 groups dim"],
    documents: Documents,
    scale: float,
) -> Float[Tensor, "seq 1 width"]:
    """``softmax(scale q k^T) v`` within each document; two calls, whatever the number of documents.

    The first has the documents that attend to themselves, queries and keys alike. The second has the branches: queries
    of a branch over the keys of its prefix and its own, causal, so that the last query sees the last key. No mask of
    the row exists.

    Args:
        query: ``heads`` a multiple of ``groups``; consecutive heads share a key and a value.
        key: See ``query``.
        value: See ``query``.
        documents: What the row is made of; their lengths add up to ``seq``.
        scale: Of the scores, usually ``dim ** -0.5``.
    """
    end = sum(documents.wholes)
    own = key[:end], value[:end]
    context = attend_apart(query[:end], *own, documents.wholes, documents.wholes, scale)
    if not documents.branches:
        return context
    seen = _branch_keys(documents, key.device)
    lengths = [branch.length for branch in documents.branches]
    key_lengths = [branch.prefix_length + branch.length for branch in documents.branches]
    keys, values = key.index_select(0, seen), value.index_select(0, seen)
    return torch.cat([context, attend_apart(query[end:], keys, values, lengths, key_lengths, scale)])


def attend_apart(
    query: Float[Tensor, "queries 1 heads dim"],
    key: Float[Tensor, "keys 1 groups dim"],
    value: Float[Tensor, "keys 1 groups dim"],
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
) -> Float[Tensor, "queries 1 width"]:
    """Causal attention of many documents that lie end to end; the queries of each are the last positions of its keys.

    Args:
        query: All documents' queries.
        key: All documents' keys; ``value`` likewise.
        value: See ``key``.
        query_lengths: Queries of each document.
        key_lengths: Keys of each document, at least as many.
        scale: Of the scores.
    """
    if npu.holds(query):
        return npu.varlen_attention(query, key, value, query_lengths, key_lengths, scale)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and _has_flash_attention():
        return flash_attention(query, key, value, query_lengths, key_lengths, scale)
    # torch.split, not slices: the gradient of each slice would be as long as the row
    queries, keys, values = (
        torch.split(tensor, list(lengths))
        for tensor, lengths in ((query, query_lengths), (key, key_lengths), (value, key_lengths))
    )
    parts = zip(queries, keys, values, strict=True)
    return torch.cat([causal_attention(*part, scale) for part in parts])


def flash_attention(
    query: Float[Tensor, "queries 1 heads dim"],
    key: Float[Tensor, "keys 1 groups dim"],
    value: Float[Tensor, "keys 1 groups dim"],
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
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
    return moved(torch.cat(parts), device)


@functools.lru_cache(_MICRO_BATCHES_IN_FLIGHT)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Int[Tensor, " bound"]:
    """Where each document begins, and where the last one ends."""
    return moved(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), device)
