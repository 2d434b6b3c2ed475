"""Ascend NPUs: MindSpeed's context-parallel attention, in which no rank gathers all keys and values of all heads."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor


def ring_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, group: dist.ProcessGroup) -> Tensor:
    """``softmax(scale q k^T) v``, causal on the full sequence, by MindSpeed's ring attention.

    Each rank holds two chunks of the sequence (:mod:`mindspeed_simpo.parallel.context`) and sends keys and values to
    the next rank in ``ranks - 1`` messages. Memory: three slices ``[seq / ranks, row, groups, dim]`` at a time.

    Args:
        query: ``[seq / ranks, row, heads, dim]``, this rank's positions.
        key: ``[seq / ranks, row, groups, dim]``, this rank's positions.
        value: As ``key``.
        scale: Factor of the scores ``q k^T``.
        group: The context-parallel ranks.

    Returns:
        ``[seq / ranks, row, heads x dim]``.

    Source: ``ringattn_context_parallel`` of MindSpeed, as ``--context-parallel-algo megatron_cp_algo`` uses it there.
    """
    from mindspeed.core.context_parallel.ring_context_parallel.ring_context_parallel import ringattn_context_parallel

    ring = {
        "causal": True,
        "cp_group": group,
        "cp_size": group.size(),
        "rank": group.rank(),
        "cp_global_ranks": dist.get_process_group_ranks(group),
        "cp_group_for_send_recv_overlap": None,
        "megatron_cp_in_bnsd": False,
        "cache_policy": None,
        "pse": None,
        "pse_type": None,
    }
    query_heads = query.shape[2]
    rows = (tensor.flatten(2) for tensor in (query, key, value))
    context: Tensor = ringattn_context_parallel(*rows, query_heads, ring, scale, None, 0.0)
    return context


def ulysses_attention(
    query: Tensor, key: Tensor, value: Tensor, attend: Callable[..., Tensor], group: dist.ProcessGroup
) -> Tensor:
    """``attend`` on the full sequence, with ``heads / ranks`` heads on each rank, by MindSpeed's all-to-all (Ulysses).

    Memory: the full sequence of ``heads / ranks`` heads. Communication: four all-to-alls a layer, each of the size of
    a slice.

    Args:
        query: ``[seq / ranks, row, heads, dim]``, this rank's positions; ``heads`` is a multiple of ``ranks``.
        key: ``[seq / ranks, row, groups, dim]``; ``groups`` is a multiple of ``ranks``, or a divisor of ``ranks``, in
            which case each head is repeated.
        value: As ``key``.
        attend: ``attend(query, key, value)`` of all positions, in the order of the ranks' slices, and of the rank's
            heads -> ``[seq, row, heads / ranks x dim]`` in the same order.
        group: The context-parallel ranks.

    Returns:
        ``[seq / ranks, row, heads x dim]``.

    Source: ``all_to_all`` of MindSpeed, as ``--context-parallel-algo ulysses_cp_algo`` uses it there.
    """
    from mindspeed.core.context_parallel.ulysses_context_parallel.unaligned_cp.mapping import all_to_all

    repeats = max(1, group.size() // key.shape[2])
    key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
    whole = attend(*(all_to_all(tensor, group, 2, 0) for tensor in (query, key, value)))
    shares = whole.view(*whole.shape[:2], -1, query.shape[3])
    context: Tensor = all_to_all(shares, group, 0, 2)
    return context.flatten(2)
