"""Attention of packed rows: each document to itself and to its prefix, by the fastest kernel of the device."""

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
    """``softmax(cap(scale q k^T)) v`` within each document, in at most two variable-length calls.

    The first call computes the documents that attend causally to themselves. The second call computes the branches: the
    queries of a branch attend to all keys of the branch's prefix and causally to the branch itself. No mask over the
    whole row is materialised.

    Args:
        query: ``heads`` is a multiple of ``groups``; consecutive query heads share a key-value head.
        key: Keys of all positions of the row.
        value: Values of all positions of the row.
        documents: Documents and branches of the row; their lengths add up to ``seq``.
        scale: Factor of the scores, usually ``dim ** -0.5``.
        window: Number of keys of the own sequence that a query attends to, its own included; None for all earlier ones.
        softcap: See :func:`~mindspeed_simpo.model.causal.causal_attention`.
    """
    end = sum(documents.wholes)
    own = key[:end], value[:end]
    context = varlen_attention(query[:end], *own, documents.wholes, documents.wholes, scale, window, softcap)
    if not documents.branches:
        return context
    lengths_of_pieces, seen = _branch_pieces(documents)
    lengths = [branch.length for branch in documents.branches]
    key_lengths = [branch.prefix_length + branch.length for branch in documents.branches]
    # pieces, not an index, whose backward adds element by element
    keys, values = (
        torch.cat([pieces[piece] for piece in seen])
        for pieces in (torch.split(tensor, lengths_of_pieces) for tensor in (key, value))
    )
    branches = varlen_attention(query[end:], keys, values, lengths, key_lengths, scale, window, softcap)
    return torch.cat([context, branches])


def varlen_attention(
    query: Float[Tensor, "queries 1 heads dim"],
    key: Float[Tensor, "keys 1 groups dim"],
    value: Float[Tensor, "keys 1 groups dim"],
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "queries 1 width"]:
    """Causal attention of concatenated documents; the queries of a document have the last positions of its keys.

    Args:
        query: Queries of all documents, concatenated.
        key: Keys of all documents, concatenated.
        value: Values of all documents, concatenated.
        query_lengths: Number of queries of each document.
        key_lengths: Number of keys of each document, at least that of its queries.
        scale: Factor of the scores.
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
    # torch.split, not slices: the backward of each slice would allocate a gradient of the whole row
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
    """:func:`varlen_attention` by the flash-attn package, whose causal mask is aligned to the last query and key."""
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


# What follows is the same for all layers of a micro-batch; the caches copy each tensor to the device once

_MICRO_BATCHES_IN_FLIGHT = 64


@functools.lru_cache(_MICRO_BATCHES_IN_FLIGHT)
def _branch_pieces(documents: Documents) -> tuple[list[int], list[int]]:
    """The row in pieces, and the pieces that are the keys of the branches.

    Returns:
        The lengths of the pieces, in the order of the row; and indices of pieces: for each branch those of its prefix,
        then those of the branch.
    """
    spans, start = [], sum(documents.wholes)
    for branch in documents.branches:
        spans.append((branch.prefix_start, branch.prefix_start + branch.prefix_length))
        spans.append((start, start + branch.length))
        start += branch.length
    cuts = sorted({0, start}.union(*spans))
    number = {cut: index for index, cut in enumerate(cuts)}
    lengths = [stop - begin for begin, stop in itertools.pairwise(cuts)]
    return lengths, [piece for begin, stop in spans for piece in range(number[begin], number[stop])]


@functools.lru_cache(_MICRO_BATCHES_IN_FLIGHT)
def document_lengths(documents: Documents, device: torch.device) -> Int[Tensor, " seq"]:
    """int64 length of the sequence of each position of a packed row, tokens; that of a branch includes its prefix."""
    wholes = [torch.full((length,), length) for length in documents.wholes]
    branches = [torch.full((each.length,), each.prefix_length + each.length) for each in documents.branches]
    return to_device(torch.cat([*wholes, *branches]), device)


@functools.lru_cache(_MICRO_BATCHES_IN_FLIGHT)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Int[Tensor, " bound"]:
    """int32 start of each document, then the end of the last one (``cu_seqlens`` of flash-attn)."""
    return to_device(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), device)
