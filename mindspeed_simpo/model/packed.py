"""Attention of packed rows: each document to itself and to its prefix, by the fastest kernel of the device."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mindspeed_simpo.batch import Documents, to_device
from mindspeed_simpo.device import cuda, npu
from mindspeed_simpo.model.causal import causal_attention
from mindspeed_simpo.model.kernels import chosen_kernel
from mindspeed_simpo.model.visible import row_mask
from mindspeed_simpo.parallel.context import positions_of, segments_of, spans_of


def packed_attention(
    query: Float[Tensor, "seq 1 heads dim"],
    key: Float[Tensor, "seq 1 groups dim"],
    value: Float[Tensor, "seq 1 groups dim"],
    documents: Documents,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "seq 1 width"]:
    """``softmax(cap(scale q k^T)) v`` within each document, in at most two variable-length calls.

    The first call computes the documents that attend causally to themselves. The second call computes the branches: the
    queries of a branch attend to all keys of the branch's prefix and causally to the branch itself. No mask over the
    whole row is materialised. FlexAttention computes both in one call, without a copy of the prefixes' keys.
    :mod:`mindspeed_simpo.model.kernels` chooses.

    Args:
        query: ``heads`` is a multiple of ``groups``; consecutive query heads share a key-value head.
        key: Keys of all positions of the row.
        value: Values of all positions of the row.
        documents: Documents and branches of the row; their lengths add up to ``seq``.
        scale: Factor of the scores, usually ``dim ** -0.5``.
        window: Number of keys of the own sequence that a query attends to, its own included; None for all earlier ones.
        softcap: See :func:`~mindspeed_simpo.model.causal.causal_attention`.
        sinks: See :func:`~mindspeed_simpo.model.causal.causal_attention`.
    """
    if _takes_masks(query, window, softcap, sinks):
        mask = row_mask(documents, 0, 1, window, query.device)
        return cuda.flex_attention(query, key, value, mask, scale, softcap, sinks)
    end = sum(documents.wholes)
    own = query[:end], key[:end], value[:end], documents.wholes, documents.wholes
    context = varlen_attention(*own, scale, window, softcap, sinks)
    if not documents.branches:
        return context
    seen = _seen_by_branches(documents)
    joint = query[end:], seen.of(key), seen.of(value), seen.query_lengths, seen.key_lengths
    branches = varlen_attention(*joint, scale, window, softcap, sinks)
    return torch.cat([context, branches])


def segmented_attention(
    query: Float[Tensor, "held 1 heads dim"],
    key: Float[Tensor, "seq 1 groups dim"],
    value: Float[Tensor, "seq 1 groups dim"],
    documents: Documents,
    rank: int,
    size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "held 1 width"]:
    """:func:`packed_attention` for the queries that one of ``size`` context-parallel ranks holds, in one call.

    Each segment of a document attends to the keys of its document, and of the document's prefix, up to its own end:
    the last token of a segment and the first one of the next belong together, whichever ranks hold them.

    Args:
        query: Queries of the positions of the rank (:func:`~mindspeed_simpo.parallel.context.positions_of`).
        key: Keys of the positions of rank 0, then of those of rank 1, and so on.
        value: Values of the same positions as ``key``.
        documents: Documents and branches of the full row.
        rank: Context-parallel rank.
        size: Number of context-parallel ranks.
        scale: See :func:`packed_attention`.
        window: See :func:`packed_attention`.
        softcap: See :func:`packed_attention`.
        sinks: See :func:`packed_attention`.
    """
    if _takes_masks(query, window, softcap, sinks):
        key, value = (in_row_order(tensor, documents, size) for tensor in (key, value))
        mask = row_mask(documents, rank, size, window, query.device)
        return cuda.flex_attention(query, key, value, mask, scale, softcap, sinks)
    seen = _seen_by_rank(documents, rank, size)
    joint = query, seen.of(key), seen.of(value), seen.query_lengths, seen.key_lengths
    return varlen_attention(*joint, scale, window, softcap, sinks)


def in_row_order(slices: Float[Tensor, "seq *rest dim"], documents: Documents, size: int) -> Tensor:
    """The full packed row from the slices of all ranks, concatenated in rank order."""
    return _row_of_slices(documents, size).of(slices)


def in_rank_order(row: Float[Tensor, "seq *rest dim"], documents: Documents, size: int) -> Tensor:
    """The inverse of :func:`in_row_order`."""
    return _slices_of_row(documents, size).of(row)


def varlen_attention(
    query: Float[Tensor, "queries 1 heads dim"],
    key: Float[Tensor, "keys 1 groups dim"],
    value: Float[Tensor, "keys 1 groups dim"],
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
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
        sinks: See :func:`packed_attention`.
    """
    if window is not None and window >= max(key_lengths, default=0):
        window = None
    documents = query, key, value, query_lengths, key_lengths
    kernel = chosen_kernel(query, packed=True, window=window, softcap=softcap, sinks=sinks)
    if kernel == "npu_fusion_attention":
        assert softcap is None, "no operator of NPUs caps the scores: refused when the model was built"
        return npu.varlen_attention(*documents, scale, window, sinks)
    if kernel == "flash_attn":
        return cuda.flash_attention(*documents, scale, window, softcap)
    if kernel == "varlen_attn":
        return cuda.varlen_attention(*documents, scale, window)
    # torch.split, not slices: the backward of each slice would allocate a gradient of the whole row
    queries, keys, values = (
        torch.split(tensor, list(lengths))
        for tensor, lengths in ((query, query_lengths), (key, key_lengths), (value, key_lengths))
    )
    parts = zip(queries, keys, values, strict=True)
    return torch.cat([causal_attention(*part, scale, window, softcap, sinks) for part in parts])


def _takes_masks(query: Tensor, window: int | None, softcap: float | None, sinks: Tensor | None) -> bool:
    kernel = chosen_kernel(query, packed=True, window=window, softcap=softcap, sinks=sinks)
    return kernel == "flex_attention"


# What follows is the same for all layers of a micro-batch; the caches copy each tensor to the device once

_MICRO_BATCHES_IN_FLIGHT = 64


@dataclass(frozen=True)
class _Seen:
    """What the queries of some documents attend to, as pieces of a tensor along its first axis.

    Pieces are copied; the backward of an index would add element by element.
    """

    lengths: list[int]
    """Of the pieces into which the tensor is split."""
    pieces: list[int]
    """Indices of the pieces that are concatenated; a piece may occur several times."""
    query_lengths: list[int]
    """Queries of each document."""
    key_lengths: list[int]
    """Keys of each document."""

    @classmethod
    def in_row(
        cls,
        held: Sequence[tuple[int, int]],
        wanted: Sequence[tuple[int, int]],
        query_lengths: Sequence[int] = (),
        key_lengths: Sequence[int] = (),
    ) -> _Seen:
        """The pieces that make up ``wanted`` in a tensor that holds ``held``; both are spans of positions in the row.

        Args:
            held: Spans that cover the row, in the order in which the tensor holds them.
            wanted: Spans to concatenate.
            query_lengths: As the attribute.
            key_lengths: As the attribute.
        """
        cuts = sorted({cut for span in (*held, *wanted) for cut in span})
        place = {cut: index for index, cut in enumerate(cuts)}
        lengths: list[int] = []
        number: dict[int, int] = {}
        for start, stop in held:
            for index in range(place[start], place[stop]):
                number[index] = len(lengths)
                lengths.append(cuts[index + 1] - cuts[index])
        pieces = [number[index] for start, stop in wanted for index in range(place[start], place[stop])]
        return cls(lengths, pieces, list(query_lengths), list(key_lengths))

    def of(self, tensor: Float[Tensor, "seq *rest dim"]) -> Float[Tensor, "keys *rest dim"]:
        """The concatenated pieces of ``tensor``."""
        pieces = torch.split(tensor, self.lengths)
        return torch.cat([pieces[piece] for piece in self.pieces])


@functools.lru_cache(_MICRO_BATCHES_IN_FLIGHT)
def _seen_by_branches(documents: Documents) -> _Seen:
    spans, start = [], sum(documents.wholes)
    for branch in documents.branches:
        spans.append((branch.prefix_start, branch.prefix_start + branch.prefix_length))
        spans.append((start, start + branch.length))
        start += branch.length
    lengths = [branch.length for branch in documents.branches]
    return _Seen.in_row(
        [(0, start)], spans, lengths, [branch.prefix_length + branch.length for branch in documents.branches]
    )


@functools.lru_cache(_MICRO_BATCHES_IN_FLIGHT)
def _seen_by_rank(documents: Documents, rank: int, size: int) -> _Seen:
    starts = [0, *itertools.accumulate(documents.lengths)]
    wanted, query_lengths, key_lengths = [], [], []
    for document, start, stop in segments_of(documents.lengths, rank, size):
        prefix_start, prefix_length = documents.prefix_of(document)
        wanted.append((prefix_start, prefix_start + prefix_length))
        wanted.append((starts[document], starts[document] + stop))
        query_lengths.append(stop - start)
        key_lengths.append(prefix_length + stop)
    return _Seen.in_row(_spans_of_ranks(documents, size), wanted, query_lengths, key_lengths)


@functools.lru_cache(_MICRO_BATCHES_IN_FLIGHT)
def _row_of_slices(documents: Documents, size: int) -> _Seen:
    return _Seen.in_row(_spans_of_ranks(documents, size), [(0, sum(documents.lengths))])


@functools.lru_cache(_MICRO_BATCHES_IN_FLIGHT)
def _slices_of_row(documents: Documents, size: int) -> _Seen:
    return _Seen.in_row([(0, sum(documents.lengths))], _spans_of_ranks(documents, size))


def _spans_of_ranks(documents: Documents, size: int) -> list[tuple[int, int]]:
    return [span for rank in range(size) for span in spans_of(documents.lengths, rank, size)]


@functools.lru_cache(_MICRO_BATCHES_IN_FLIGHT)
def document_lengths(documents: Documents, rank: int, size: int, device: torch.device) -> Int[Tensor, " seq"]:
    """int64 length of the sequence of each position that a context-parallel rank holds, tokens.

    The length of a branch includes its prefix.

    Args:
        documents: Documents and branches of the full row.
        rank: Context-parallel rank.
        size: Number of context-parallel ranks.
        device: Device of the result.
    """
    parts = [
        torch.full((length,), length + documents.prefix_of(document)[1])
        for document, length in enumerate(documents.lengths)
    ]
    held = positions_of(rank, size, documents.lengths, torch.device("cpu"))
    return to_device(torch.cat(parts)[held], device)
