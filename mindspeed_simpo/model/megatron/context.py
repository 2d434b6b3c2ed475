"""Context-parallel attention: the queries of one rank over the keys of all ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from mindspeed_simpo.config.options import ContextParallelAlgo
from mindspeed_simpo.device import npu_context
from mindspeed_simpo.model.causal import causal_attention
from mindspeed_simpo.parallel.collectives import gather_along_first
from mindspeed_simpo.parallel.context import chunks_of, in_rank_order, in_sequence_order


def gathered_attention(
    query: Float[Tensor, "seq row heads dim"],
    key: Float[Tensor, "seq row groups dim"],
    value: Float[Tensor, "seq row groups dim"],
    scale: float,
    window: int | None,
    softcap: float | None,
    group: dist.ProcessGroup,
) -> Float[Tensor, "seq row width"]:
    """Causal attention of this rank's two chunks over all-gathered keys and values; on any device.

    Each chunk attends to the keys up to its own end, so that the ranks have equal work. Gathered keys and values take
    two tensors ``[full seq, row, groups, dim]`` per layer.

    Args:
        query: Queries of this rank's two chunks, ``seq`` positions.
        key: Keys of the same positions.
        value: Values of the same positions.
        scale: Factor of the scores.
        window: See :func:`~mindspeed_simpo.model.causal.causal_attention`.
        softcap: See :func:`~mindspeed_simpo.model.causal.causal_attention`.
        group: The context-parallel ranks.
    """
    size = group.size()
    key, value = (in_sequence_order(gather_along_first(tensor, group), size) for tensor in (key, value))
    length = query.shape[0] // 2
    parts = [
        causal_attention(part, key[: (chunk + 1) * length], value[: (chunk + 1) * length], scale, window, softcap)
        for part, chunk in zip(query.chunk(2), chunks_of(group.rank(), size), strict=True)
    ]
    return torch.cat(parts)


def ulysses_attention(
    query: Float[Tensor, "seq row heads dim"],
    key: Float[Tensor, "seq row groups dim"],
    value: Float[Tensor, "seq row groups dim"],
    scale: float,
    window: int | None,
    softcap: float | None,
    group: dist.ProcessGroup,
) -> Float[Tensor, "seq row width"]:
    """Causal attention by Ulysses: all-to-alls shard heads in place of the sequence and back; Ascend only.

    Args:
        query: Queries of this rank's two chunks, ``seq`` positions.
        key: Keys of the same positions.
        value: Values of the same positions.
        scale: Factor of the scores.
        window: See :func:`~mindspeed_simpo.model.causal.causal_attention`.
        softcap: See :func:`~mindspeed_simpo.model.causal.causal_attention`.
        group: The context-parallel ranks.
    """
    size = group.size()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (in_sequence_order(tensor, size) for tensor in (query, key, value))
        return in_rank_order(causal_attention(query, key, value, scale, window, softcap), size)

    return npu_context.ulysses_attention(query, key, value, attend, group)


def ring_attention(
    query: Float[Tensor, "seq row heads dim"],
    key: Float[Tensor, "seq row groups dim"],
    value: Float[Tensor, "seq row groups dim"],
    scale: float,
    window: int | None,
    softcap: float | None,
    group: dist.ProcessGroup,
) -> Float[Tensor, "seq row width"]:
    """Causal attention by MindSpeed's ring attention; Ascend only.

    Args:
        query: Queries of this rank's two chunks, ``seq`` positions.
        key: Keys of the same positions.
        value: Values of the same positions.
        scale: Factor of the scores.
        window: None, or at least the full sequence length; ``config.validation`` refuses shorter windows.
        softcap: None; models with a soft cap are refused on NPUs.
        group: The context-parallel ranks.
    """
    assert window is None or window >= group.size() * query.shape[0], "MindSpeed's ring attention has no sliding window"
    assert softcap is None, "MindSpeed's ring attention has no soft cap"
    return npu_context.ring_attention(query, key, value, scale, group)


CONTEXT_PARALLEL_ATTENTION: dict[ContextParallelAlgo, Callable[..., Tensor]] = {
    "gathered": gathered_attention,
    "megatron_cp_algo": ring_attention,
    "ulysses_cp_algo": ulysses_attention,
}
"""The attention of each value of ``context_parallel_algo``."""
