"""Core attention: what runs between the rotary embedding and the output projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from mindspeed_simpo.batch import Documents
from mindspeed_simpo.model.causal import causal_attention
from mindspeed_simpo.model.packed import packed_attention
from mindspeed_simpo.parallel.collectives import gather_along_first
from mindspeed_simpo.parallel.context import chunks_of, natural_order


class CausalAttention(torch.nn.Module):
    """``softmax(q k^T / sqrt(dim)) v`` over the keys up to each query, on the whole sequence.

    Rows are padded on the right, so what follows a token cannot reach it and causality alone is enough. The documents
    of a packed row attend apart (:mod:`mindspeed_simpo.model.packed`).

    Under context parallelism a rank holds queries, keys and values of its two chunks of the sequence
    (:mod:`mindspeed_simpo.parallel.context`). Keys and values are gathered, and each chunk attends to the keys up to
    its own end: memory of two tensors ``[whole seq, row, groups, dim]`` a layer, work divided evenly.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        context_group: dist.ProcessGroup,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.context_group = context_group
        self.softmax_scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

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
        size = self.context_group.size()
        if attention_bias.wholes:
            assert size == 1, "a packed row is whole on every rank"
            return packed_attention(query, key, value, attention_bias, self.softmax_scale)
        if size == 1:
            return causal_attention(query, key, value, self.softmax_scale)
        order = natural_order(size, size * query.shape[0], query.device)
        key, value = (gather_along_first(tensor, self.context_group)[order] for tensor in (key, value))
        length = query.shape[0] // 2
        chunks = chunks_of(self.context_group.rank(), size)
        parts = [
            causal_attention(part, key[: (chunk + 1) * length], value[: (chunk + 1) * length], self.softmax_scale)
            for part, chunk in zip(query.chunk(2), chunks, strict=True)
        ]
        return torch.cat(parts)
