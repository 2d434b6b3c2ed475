"""How a sequence is divided over context-parallel ranks.

The sequence is cut into ``2 * cp`` equal chunks and rank ``r`` holds chunks ``r`` and ``2 * cp - 1 - r``, in that order
(megatron's and MindSpeed's order): under a causal mask every rank then attends to equally much.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def chunks_of(rank: int, size: int) -> tuple[int, ...]:
    """Numbers of the chunks that one rank holds, of ``2 * size`` (of 1 where there is one rank)."""
    return (0,) if size == 1 else (rank, 2 * size - 1 - rank)


def positions_of(rank: int, size: int, seq_length: int, device: torch.device) -> Int[Tensor, " seq"]:
    """Positions of the whole sequence that one rank holds, in the order it holds them.

    Args:
        rank: Context-parallel rank.
        size: Context-parallel ranks.
        seq_length: Of the whole sequence; a multiple of ``2 * size`` where there are several ranks.
        device: Of the result.
    """
    if size == 1:
        return torch.arange(seq_length, device=device)
    length, rest = divmod(seq_length, 2 * size)
    assert rest == 0, f"a sequence of {seq_length} cannot be cut into {2 * size} equal chunks"
    return torch.cat(
        [torch.arange(chunk * length, (chunk + 1) * length, device=device) for chunk in chunks_of(rank, size)]
    )


def natural_order(size: int, seq_length: int, device: torch.device) -> Int[Tensor, " seq"]:
    """Index that puts the ranks' slices, laid one after the other, back into the order of the sequence."""
    held = torch.cat([positions_of(rank, size, seq_length, device) for rank in range(size)])
    return torch.argsort(held)
