"""Core attention: what runs between the rotary embedding and the output projection."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from mindspeed_simpo.batch import Documents
from mindspeed_simpo.config.options import ContextParallelAlgo
from mindspeed_simpo.device import npu_context
from mindspeed_simpo.model.causal import causal_attention
from mindspeed_simpo.model.packed import packed_attention
from mindspeed_simpo.parallel.collectives import gather_along_first
from mindspeed_simpo.parallel.context import chunks_of, natural_order


class CausalAttention(torch.nn.Module):
    """``softmax(q k^T / sqrt(dim)) v`` over the keys up to each query, on the whole sequence.

    Rows are padded on the right, so what follows a token cannot reach it and causality alone is enough. The documents
    of a packed row attend apart (:mod:`mindspeed_simpo.model.packed`).

    Under context parallelism a rank holds queries, keys and values of its two chunks of the sequence
    (:mod:`mindspeed_simpo.parallel.context`), and ``context_parallel_algo`` says how they meet:
    :func:`gathered_attention`, or on Ascend :func:`mindspeed_simpo.device.npu_context.ring_attention` or
    :func:`ulysses_attention`.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        context_group: dist.ProcessGroup,
        context_parallel_algo: ContextParallelAlgo,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.context_group = context_group
        self.softmax_scale = scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        if context_group.size() == 1:
            self._attend = partial(causal_attention, scale=scale)
        else:
            across_ranks = {
                "gathered": gathered_attention,
                "megatron_cp_algo": npu_context.ring_attention,
                "ulysses_cp_algo": ulysses_attention,
            }
            self._attend = partial(across_ranks[context_parallel_algo], scale=scale, group=context_group)

    def forward(
        self,
        query: Float[Tensor, "seq row heads dim"],
        key: Float[Tensor, "seq row groups dim"],
        value: Float[Tensor, "seq row groups dim"],
        attention_mask: Tensor | None = None,
        attention_bias: Documents | None = None,
        **_: Any,
    ) -> Float[Tensor, "seq row width"]:
        """Attend causally.

        Args:
            query: This rank's heads and positions, already rotated; ``key`` and ``value`` likewise.
            key: See ``query``.
            value: See ``query``.
            attention_mask: None; causality is the only mask.
            attention_bias: What a row holds, under the name that megatron-core has for what it does not read.
        """
        assert attention_mask is None, "the causal mask suffices"
        assert attention_bias is not None, "what a row holds was lost on the way: the rows would run into each other"
        if attention_bias.wholes:
            assert self.context_group.size() == 1, "a packed row is whole on every rank"
            return packed_attention(query, key, value, attention_bias, self.softmax_scale)
        return self._attend(query, key, value)


def gathered_attention(
    query: Float[Tensor, "seq row heads dim"],
    key: Float[Tensor, "seq row groups dim"],
    value: Float[Tensor, "seq row groups dim"],
    scale: float,
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
        group: The context-parallel ranks.
    """
    size = group.size()
    order = natural_order(size, size * query.shape[0], query.device)
    key, value = (gather_along_first(tensor, group)[order] for tensor in (key, value))
    length = query.shape[0] // 2
    parts = [
        causal_attention(part, key[: (chunk + 1) * length], value[: (chunk + 1) * length], scale)
        for part, chunk in zip(query.chunk(2), chunks_of(group.rank(), size), strict=True)
    ]
    return torch.cat(parts)


def ulysses_attention(
    query: Float[Tensor, "seq row heads dim"],
    key: Float[Tensor, "seq row groups dim"],
    value: Float[Tensor, "seq row groups dim"],
    scale: float,
    group: dist.ProcessGroup,
) -> Float[Tensor, "seq row width"]:
    """Causal attention of a share of the heads over the whole sequence; Ascend only.

    Args:
        query: This rank's positions.
        key: See ``query``.
        value: See ``query``.
        scale: Of the scores.
        group: The context-parallel ranks.
    """
    order = natural_order(group.size(), group.size() * query.shape[0], query.device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return causal_attention(query[order], key[order], value[order], scale)[torch.argsort(order)]

    return npu_context.ulysses_attention(query, key, value, attend, group)
