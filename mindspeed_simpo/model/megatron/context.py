"""Context-parallel attention: the queries of one rank over the keys of all ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from mindspeed_simpo.batch import Documents
from mindspeed_simpo.config.options import ContextParallelAlgo
from mindspeed_simpo.device import npu_context
from mindspeed_simpo.model import packed
from mindspeed_simpo.model.causal import causal_attention
from mindspeed_simpo.parallel.collectives import gather_along_first
from mindspeed_simpo.parallel.context import chunks_of, in_rank_order, in_sequence_order


def gathered_attention(
    query: Float[Tensor, "seq row heads dim"],
    key: Float[Tensor, "seq row groups dim"],
    value: Float[Tensor, "seq row groups dim"],
    documents: Documents,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Float[Tensor, " heads"] | None,
    group: dist.ProcessGroup,
) -> Float[Tensor, "seq row width"]:
    """Causal attention of this rank's chunks over all-gathered keys and values; on any device.

    Each chunk attends to the keys up to its own end, so that the ranks have equal work. Gathered keys and values take
    two tensors ``[full seq, row, groups, dim]`` per layer, and their copies in the order of the sequences two more.

    Args:
        query: Queries of this rank's ``seq`` positions.
        key: Keys of the same positions.
        value: Values of the same positions.
        documents: Documents of the full row where it is packed.
        scale: Factor of the scores.
        window: See :func:`~mindspeed_simpo.model.causal.causal_attention`.
        softcap: See :func:`~mindspeed_simpo.model.causal.causal_attention`.
        sinks: See :func:`~mindspeed_simpo.model.causal.causal_attention`.
        group: The context-parallel ranks.
    """
    size, scores = group.size(), (scale, window, softcap, sinks)
    key, value = (gather_along_first(tensor, group) for tensor in (key, value))
    if documents.wholes:
        return packed.segmented_attention(query, key, value, documents, group.rank(), size, *scores)
    key, value = (in_sequence_order(tensor, size) for tensor in (key, value))
    length = query.shape[0] // 2
    parts = [
        causal_attention(part, key[: (chunk + 1) * length], value[: (chunk + 1) * length], *scores)
        for part, chunk in zip(query.chunk(2), chunks_of(group.rank(), size), strict=True)
    ]
    return torch.cat(parts)


def ulysses_attention(
    query: Float[Tensor, "seq row heads dim"],
    key: Float[Tensor, "seq row groups dim"],
    value: Float[Tensor, "seq row groups dim"],
    documents: Documents,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Float[Tensor, " heads"] | None,
    group: dist.ProcessGroup,
) -> Float[Tensor, "seq row width"]:
    """Causal attention by Ulysses: all-to-alls shard heads in place of the sequence and back; Ascend only.

    Args:
        query: Queries of this rank's ``seq`` positions.
        key: Keys of the same positions.
        value: Values of the same positions.
        documents: Documents of the full row where it is packed.
        scale: Factor of the scores.
        window: See :func:`~mindspeed_simpo.model.causal.causal_attention`.
        softcap: See :func:`~mindspeed_simpo.model.causal.causal_attention`.
        sinks: See :func:`~mindspeed_simpo.model.causal.causal_attention`.
        group: The context-parallel ranks.
    """
    size = group.size()
    own_sinks = None if sinks is None else sinks.chunk(size)[group.rank()]
    scores = scale, window, softcap, own_sinks

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if documents.wholes:
            query, key, value = (packed.in_row_order(tensor, documents, size) for tensor in (query, key, value))
            context = packed.packed_attention(query, key, value, documents, *scores)
            return packed.in_rank_order(context, documents, size)
        query, key, value = (in_sequence_order(tensor, size) for tensor in (query, key, value))
        return in_rank_order(causal_attention(query, key, value, *scores), size)

    return npu_context.ulysses_attention(query, key, value, attend, group)


def ring_attention(
    query: Float[Tensor, "seq row heads dim"],
    key: Float[Tensor, "seq row groups dim"],
    value: Float[Tensor, "seq row groups dim"],
    documents: Documents,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Float[Tensor, " heads"] | None,
    group: dist.ProcessGroup,
) -> Float[Tensor, "seq row width"]:
    """Causal attention by MindSpeed's ring attention; Ascend only.

    Args:
        query: Queries of this rank's ``seq`` positions.
        key: Keys of the same positions.
        value: Values of the same positions.
        documents: Empty; ``config.validation`` refuses packed rows.
        scale: Factor of the scores.
        window: None, or at least the full sequence length; ``config.validation`` refuses shorter windows.
        softcap: None; models with a soft cap are refused on NPUs.
        sinks: None; ``config.validation`` refuses models with sinks.
        group: The context-parallel ranks.
    """
    assert not documents.wholes, "MindSpeed's ring attention takes no packed row of uneven documents"
    assert window is None or window >= group.size() * query.shape[0], "MindSpeed's ring attention has no sliding window"
    assert softcap is None, "MindSpeed's ring attention has no soft cap"
    assert sinks is None, "MindSpeed's ring attention has no sinks"
    return npu_context.ring_attention(query, key, value, scale, group)


CONTEXT_PARALLEL_ATTENTION: dict[ContextParallelAlgo, Callable[..., Tensor]] = {
    "gathered": gathered_attention,
    "megatron_cp_algo": ring_attention,
    "ulysses_cp_algo": ulysses_attention,
}
"""The attention of each value of ``context_parallel_algo``."""
