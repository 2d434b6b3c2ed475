"""Attention of one context-parallel rank's positions to those of all ranks."""

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
from mindspeed_simpo.parallel.context import chunks_of, natural_order


def gathered_attention(
    query: Float[Tensor, "seq row heads dim"],
    key: Float[Tensor, "seq row groups dim"],
    value: Float[Tensor, "seq row groups dim"],
    scale: float,
    window: int | None,
    softcap: float | None,
    group: dist.ProcessGroup,
) -> Float[Tensor, "seq row width"]:
    """Causal attention of this rank's two chunks over keys and values gathered from all ranks; any device.

    Each chunk attends to the keys up to its own end: memory of two tensors ``[whole seq, row, groups, dim]`` a layer,
    work divided evenly.

    Args:
        query: This rank's positions.
        key: See ``query``.
        value: See ``query``.
        scale: Of the scores.
        window: See :func:`~mindspeed_simpo.model.causal.causal_attention`.
        softcap: See ``window``.
        group: The context-parallel ranks.
    """
    size = group.size()
    order = natural_order(size, size * query.shape[0], query.device)
    key, value = (gather_along_first(tensor, group)[order] for tensor in (key, value))
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
    """Causal attention of a share of the heads over the whole sequence; Ascend only.

    Args:
        query: This rank's positions.
        key: See ``query``.
        value: See ``query``.
        scale: Of the scores.
        window: See :func:`~mindspeed_simpo.model.causal.causal_attention`.
        softcap: See ``window``.
        group: The context-parallel ranks.
    """
    order = natural_order(group.size(), group.size() * query.shape[0], query.device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        whole = causal_attention(query[order], key[order], value[order], scale, window, softcap)
        return whole[torch.argsort(order)]

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
    """Causal attention by MindSpeed's ring of keys and values; Ascend only.

    Args:
        query: This rank's positions.
        key: See ``query``.
        value: See ``query``.
        scale: Of the scores.
        window: None, or no shorter than the sequence: the layout is refused otherwise.
        softcap: None.
        group: The context-parallel ranks.
    """
    assert window is None or window >= group.size() * query.shape[0], "the ring knows no window"
    assert softcap is None, "the ring knows no soft cap"
    return npu_context.ring_attention(query, key, value, scale, group)


ACROSS_RANKS: dict[ContextParallelAlgo, Callable[..., Tensor]] = {
    "gathered": gathered_attention,
    "megatron_cp_algo": ring_attention,
    "ulysses_cp_algo": ulysses_attention,
}
