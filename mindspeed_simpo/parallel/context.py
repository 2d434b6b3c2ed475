"""Slices of a sequence under context parallelism.

The sequence is divided into ``2 * cp`` equal chunks, and rank ``r`` holds the chunks ``r`` and ``2 * cp - 1 - r``, in
that order (the order of megatron-core and MindSpeed). Under a causal mask all ranks then do equally much attention.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def chunks_of(rank: int, size: int) -> tuple[int, ...]:
    """Indices of the chunks that one rank holds, out of ``2 * size`` chunks (out of 1 chunk where ``size`` is 1)."""
    return (0,) if size == 1 else (rank, 2 * size - 1 - rank)


def positions_of(rank: int, size: int, seq_length: int, device: torch.device) -> Int[Tensor, " seq"]:
    """int64 positions in the full sequence of the tokens that one rank holds, in the rank's order.

    Args:
        rank: Context-parallel rank.
        size: Number of context-parallel ranks.
        seq_length: Length of the full sequence; a multiple of ``2 * size`` where ``size`` is greater than 1.
        device: Device of the result.

    Returns:
        ``[seq_length / size]``.
    """
    if size == 1:
        return torch.arange(seq_length, device=device)
    length, rest = divmod(seq_length, 2 * size)
    assert rest == 0, f"a sequence of {seq_length} cannot be cut into {2 * size} equal chunks"
    return torch.cat(
        [torch.arange(chunk * length, (chunk + 1) * length, device=device) for chunk in chunks_of(rank, size)]
    )


def in_sequence_order(slices: Float[Tensor, "seq *rest dim"], size: int) -> Float[Tensor, "seq *rest dim"]:
    """The full sequence from the slices of all ranks, concatenated in rank order; a copy of whole chunks.

    An index would have an accumulating backward, an atomic addition for each element.

    Args:
        slices: ``positions_of(0, size, seq)``, then those of rank 1, and so on.
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
