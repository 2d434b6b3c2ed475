"""Slices of a row under context parallelism.

Each document of a row is divided into ``2 * cp`` chunks, and rank ``r`` holds the chunks ``r`` and ``2 * cp - 1 - r``
of each document, in that order (the order of megatron-core and MindSpeed). Under a causal mask all ranks then do
equally much attention, document by document. A padded row is one document.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

_ROWS_IN_FLIGHT = 64


class Segment(NamedTuple):
    """Consecutive tokens of one document that one rank holds."""

    document: int
    start: int
    """First token, counted in the document."""
    stop: int
    """Token after the last."""


def chunks_of(rank: int, size: int) -> tuple[int, ...]:
    """Indices of the chunks that one rank holds, out of ``2 * size`` chunks (out of 1 chunk where ``size`` is 1)."""
    return (0,) if size == 1 else (rank, 2 * size - 1 - rank)


@functools.lru_cache(_ROWS_IN_FLIGHT)
def segments_of(lengths: tuple[int, ...], rank: int, size: int) -> tuple[Segment, ...]:
    """The segments of a row that one rank holds, in the rank's order; empty segments are left out.

    A document of ``n`` tokens has chunks of ``n // (2 size)`` tokens, and ``n % (2 size)`` of its chunks have one token
    more: those that follow, cyclically, the last longer chunk of the document before. So the ranks hold equally many
    tokens of the row, whatever the lengths of its documents.

    Args:
        lengths: Tokens of each document of the row; their sum is a multiple of ``2 * size`` where ``size`` is greater
            than 1.
        rank: Context-parallel rank.
        size: Number of context-parallel ranks.
    """
    number = len(chunks_of(0, size)) * size
    total = sum(lengths)
    assert total % number == 0, f"a row of {total} tokens cannot be cut into {number} equal chunks"
    segments: list[Segment] = []
    turn = 0
    for document, length in enumerate(lengths):
        least, longer = divmod(length, number)
        sizes = [least + ((chunk - turn) % number < longer) for chunk in range(number)]
        bounds = [0, *itertools.accumulate(sizes)]
        turn = (turn + longer) % number
        segments += [
            Segment(document, bounds[chunk], bounds[chunk + 1]) for chunk in chunks_of(rank, size) if sizes[chunk]
        ]
    return tuple(segments)


def spans_of(lengths: tuple[int, ...], rank: int, size: int) -> list[tuple[int, int]]:
    """First position in the row, and the one after the last, of each segment of :func:`segments_of`."""
    starts = [0, *itertools.accumulate(lengths)]
    return [
        (starts[document] + start, starts[document] + stop)
        for document, start, stop in segments_of(lengths, rank, size)
    ]


def positions_of(rank: int, size: int, lengths: Sequence[int], device: torch.device) -> Int[Tensor, " seq"]:
    """int64 positions in the full row of the tokens that one rank holds, in the rank's order.

    Args:
        rank: Context-parallel rank.
        size: Number of context-parallel ranks.
        lengths: See :func:`segments_of`; a padded row is one document.
        device: Device of the result.

    Returns:
        ``[sum(lengths) / size]``.
    """
    spans = spans_of(tuple(lengths), rank, size)
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in spans])


def in_sequence_order(slices: Float[Tensor, "seq *rest dim"], size: int) -> Float[Tensor, "seq *rest dim"]:
    """The full padded rows from the slices of all ranks, concatenated in rank order; a copy of whole chunks.

    An index would have an accumulating backward, an atomic addition for each element.

    Args:
        slices: Positions of rank 0 by :func:`positions_of`, then those of rank 1, and so on.
        size: Number of context-parallel ranks, at least 2.
    """
    chunks, held = slices.chunk(2 * size), _held(size)
    return torch.cat([chunks[held.index(chunk)] for chunk in range(2 * size)])


def in_rank_order(sequence: Float[Tensor, "seq *rest dim"], size: int) -> Float[Tensor, "seq *rest dim"]:
    """The inverse of :func:`in_sequence_order`."""
    chunks = sequence.chunk(2 * size)
    return torch.cat([chunks[chunk] for chunk in _held(size)])


def _held(size: int) -> list[int]:
    """The chunks that the ranks hold, in rank order."""
    return [chunk for rank in range(size) for chunk in chunks_of(rank, size)]
