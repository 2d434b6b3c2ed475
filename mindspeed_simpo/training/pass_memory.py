"""Bytes of the tensors that the passes of a step make: activations, masks, gradients inside of a layer, logits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.data.largest import LargestPass, PassShape
from mindspeed_simpo.device import DeviceName
from mindspeed_simpo.model.adapters import Adapters
from mindspeed_simpo.model.blockwise import block_size
from mindspeed_simpo.model.causal import LARGEST_MASK
from mindspeed_simpo.model.description import Attention, ClampedSwiGLU, HeadShare, Layer, ModelDescription
from mindspeed_simpo.model.naming import Chunk
from mindspeed_simpo.training.adapter_memory import AdapterMemory
from mindspeed_simpo.training.latent_memory import latent_attention_bytes

FP32 = 4
"""Bytes of a number."""
_SCORES = 3
"""Tensors of the size of a block's scores that exist at the same time where the scores have a soft cap."""
_WIDER = 6
"""Tensors of the size of a block's keys, of each query head, that exist at the same time where there are sinks."""
_CLAMPED = 6
"""Tensors of the size of its result that exist in the backward of the clamped activation, four in the others'."""


@dataclass(frozen=True)
class PassMemory:
    """The formulas of :func:`~mindspeed_simpo.training.memory.estimate_memory` for the tensors of a pass."""

    model: ModelDescription
    config: Config
    layout: Layout
    largest: LargestPass
    device: DeviceName

    @functools.cached_property
    def adapters(self) -> Adapters | None:
        """The configured adapters."""
        return Adapters.of(self.config, self.model)

    @functools.cached_property
    def adapter_memory(self) -> AdapterMemory:
        """The formulas for layers with adapters."""
        assert self.adapters is not None, "there are adapters"
        return AdapterMemory(
            self.model,
            self.config,
            self.layout,
            self.adapters,
            self.tokens,
            self.hidden,
            self.expert_rows,
            self.blockwise,
        )

    @property
    def width(self) -> int:
        """Bytes of the compute dtype."""
        return 2 if self.config.bf16_in_use else 4

    @property
    def batch(self) -> PassShape:
        """The largest pass."""
        return self.largest.shape

    @property
    def tokens(self) -> int:
        """Tokens of the largest pass on one context-parallel rank."""
        return self.batch.tokens // self.layout.context

    @property
    def hidden(self) -> int:
        """Values of the residual stream of one token on this rank."""
        return self.model.hidden_size // (self.layout.tensor if self.config.sequence_parallel else 1)

    def activation_bytes(self, chunks: Sequence[Chunk]) -> int:
        """Saved tensors of all micro-batches in flight, and those of one group of layers during recomputation."""
        kept, recomputed = zip(*(self.chunk_bytes(chunk) for chunk in chunks), strict=True)
        pipeline_size, number = self.layout.pipeline, len(chunks)
        behind = pipeline_size - chunks[0].pipeline_rank - 1
        if number == 1:
            tokens = self.largest.in_flight[behind]
            return int(kept[0] * tokens // self.batch.tokens + recomputed[0])
        # with virtual pipeline ranks all micro-batches of a step are padded to one length
        warm_up = 2 * behind + (number - 1) * pipeline_size
        in_flight = min(self.largest.passes * number, warm_up + 1)
        return int(sum(kept) * in_flight // number + max(recomputed))

    def chunk_bytes(self, chunk: Chunk) -> tuple[int, int]:
        """Saved tensors of a chunk's layers for one micro-batch, and the additional ones during recomputation."""
        residual = self.width * self.tokens * self.hidden
        layers = chunk.layers(self.model)
        wholes = [self._layer_bytes[layer] for layer in layers]
        positions = self.tokens // (self.batch.rows if self.config.batching_in_use == "padded" else 1)
        dims = sum(rotation.dims for rotation in {layer.attention.rotation for layer in layers})
        tables = 2 * self.width * positions * dims
        if self.config.recompute_granularity == "full":
            group = min(self.config.recompute_num_layers or 1, len(layers))
            if self.config.recompute_method == "block":  # the first `group` layers are recomputed, one at a time
                left = sum(wholes[group:])
                return tables + (group + 1) * residual + left, 0 if left else max(wholes) - 2 * residual
            groups = [sum(wholes[first : first + group]) for first in range(0, len(wholes), group)]
            return tables + (len(groups) + 1) * residual, max(groups) - 2 * residual
        if self.config.recompute_granularity == "selective":
            return tables + sum(wholes) - sum(self._core_bytes[layer] for layer in layers) + residual, 0
        return tables + sum(wholes) + residual, 0

    @functools.cached_property
    def _layer_bytes(self) -> dict[Layer, int]:
        return {layer: self.layer_bytes(layer) for layer in self.model.first_of_kind}

    @functools.cached_property
    def _core_bytes(self) -> dict[Layer, int]:
        """Saved tensors of a layer's attention that ``recompute_granularity: selective`` does not save."""
        kept, left = (
            {layer: self.attention_bytes(layer.attention, recomputed=each) for layer in self.model.first_of_kind}
            for each in (False, True)
        )
        return {layer: kept[layer] - left[layer] for layer in kept}

    def layer_bytes(self, layer: Layer) -> int:
        """Saved tensors of one layer without recomputation."""
        residual = self.width * self.tokens * self.hidden
        whole = 4 * residual + self.mlp_bytes(layer) + self.expert_bytes(layer)
        norms_after = sum(norm is not None for norm in (layer.norm_after_attention, layer.norm_after_mlp))
        whole += norms_after * residual + (2 + norms_after) * FP32 * self.tokens
        if self.adapters is not None:
            whole += self.adapter_memory.bytes_of(layer)
        return whole + self.attention_bytes(layer.attention, recomputed=False)

    def mlp_bytes(self, layer: Layer) -> int:
        """Saved tensors of the MLP, or of the shared expert, without its input."""
        return 0 if layer.mlp is None else 3 * self.width * self.tokens * layer.mlp.width // self.layout.tensor

    @property
    def expert_rows(self) -> float:
        """Tokens of one rank that its experts compute, per expert of a token, where all experts get equally many."""
        return self.tokens / self.layout.tensor * self.layout.expert_tensor_ranks

    def expert_bytes(self, layer: Layer) -> int:
        """Saved tensors of the experts, with equally many tokens for each.

        For each row of an expert, its input, the products of the first projection and their activation, and the
        output; the input a second time where the rows came from other ranks; scores, weights and places of each token.
        """
        experts, layout = layer.experts, self.layout
        if experts is None:
            return 0
        rows = self.expert_rows * experts.top_k
        several = layout.expert * layout.expert_tensor_ranks > 1
        hidden = self.model.hidden_size
        values = rows * (2 * hidden + 3 * experts.width // layout.expert_tensor_ranks)
        weighted = self.tokens / layout.tensor * experts.top_k * hidden if layout.expert_tensor_ranks > 1 else 0
        routing = self.tokens * (2 * experts.number + 3 * experts.top_k) * FP32
        places = rows * 8 * (5 if several else 2)
        wide = FP32 * self.tokens * hidden if self.config.bf16_in_use else 0
        return int(self.width * (values + weighted) + routing + places + wide)

    def share(self, attention: Attention) -> HeadShare:
        """Heads of the first tensor-parallel rank."""
        return attention.share(0, self.layout.tensor)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence; in packed rows at most ``seq_length``."""
        if self.config.batching_in_use == "padded":
            return self.batch.tokens // self.batch.rows
        return min(self.batch.tokens, self.config.seq_length)

    def blockwise(self, attention: Attention) -> bool:
        """Whether the attention is computed in blocks of queries, which saves only queries, keys and values."""
        if self.device == "npu":
            return False
        longest = self.longest_sequence
        masked = self.device == "cpu" and self.layout.context > 1 and longest > LARGEST_MASK
        varied = attention.softcap is not None or attention.sinks
        return masked or varied or (attention.window or longest) < longest

    def attention_bytes(self, attention: Attention, *, recomputed: bool) -> int:
        """Saved tensors of one layer's attention, between the QKV projection and the output projection.

        With q query values and k key values a token: rotated queries and keys, and the output of the QKV projection, of
        which the values are a view, ``2 q + 3 k``; the result, ``q``; unless the attention is computed in blocks, the
        result a second time where those of documents are concatenated, and one or more softmax statistics a head.
        Context ranks save the gathered keys and values instead, ``2 k`` for each token of all ranks; suffixes save the
        keys and values of prefix and suffix, ``2 k``. Where query heads share a key-value head, the CPU's kernel takes
        expanded copies: ``2 q`` in place of ``3 k`` and of each ``2 k``. With context ranks these copies, and in packed
        rows the gathered keys and values, are those that each chunk attends to (:meth:`seen_by_chunks`). Tensor ranks
        that share a key-value head also save its gathered keys and values, ``2 k``.
        """
        if attention.latent is not None:
            return latent_attention_bytes(self, attention, recomputed=recomputed)
        batch, context, share = self.batch, self.layout.context, self.share(attention)
        queries, keys = share.padded_queries * attention.head_dim, share.kv_heads * attention.head_dim
        gathered = context > 1 and self.config.context_parallel_algo == "gathered"
        packed = self.config.batching_in_use != "padded"
        joined = gathered or packed
        shared = share.queries > share.kv_heads
        normed = attention.qk_norm is not None
        # queries of several groups are not contiguous in the projection's output: the norm saves a copy
        queries_again = queries if normed and shared and share.kv_heads > 1 else 0
        blockwise = self.blockwise(attention)
        mixed = queries + (2 * keys if share.kv_parts == 1 else 2 * keys // share.kv_parts + 2 * keys)
        if recomputed:
            per_token = queries + keys + mixed + queries + queries_again
            return self.width * self.tokens * per_token
        branch_keys = batch.prefixes + batch.branch_tokens if batch.longest_branch else 0
        values = self.tokens * (2 * queries + (queries if joined and not blockwise else 0))
        copied = shared and self.device == "cpu" and not blockwise
        if copied:
            seen = self.tokens - batch.branch_tokens + branch_keys
            if gathered:
                seen = self.seen_by_chunks()
            values += 2 * queries * seen + (self.tokens * (mixed + queries_again) if normed else 0)
        elif gathered:
            seen = self.seen_by_chunks() if packed else self.tokens * context
            values += 2 * keys * seen + (self.tokens * mixed if normed else 0)
        else:
            values += self.tokens * (keys + mixed) + 2 * keys * branch_keys
        if not copied:
            values += self.tokens * queries_again
        # npu_fusion_attention saves the maximum and the sum of each row eight times
        softmax = self.tokens * share.queries * FP32 * (16 if self.device == "npu" else 1)
        norms = self.tokens * (share.queries + share.kv_heads) * FP32 if normed else 0
        order = 8 * batch.tokens // batch.rows if gathered else 0
        return self.width * values + (0 if blockwise else softmax) + norms + order

    def seen_by_chunks(self) -> int:
        """Keys of the chunks of one context rank, each from the start of its sequence, prefix included, to its end.

        A rank has the chunks ``r`` and ``2 context - 1 - r`` of each document, ``(2 context + 1) / (2 context)`` of the
        document together.
        """
        prefixes = 2 * self.batch.prefixes if self.batch.longest_branch else 0
        return self.tokens * (2 * self.layout.context + 1) // 2 + prefixes

    def largest_backward(self, chunks: Sequence[Chunk]) -> int:
        """:meth:`backward_bytes` of the layer of some chunks that allocates most."""
        return max(self._backward_bytes[layer] for chunk in chunks for layer in chunk.layers(self.model))

    @functools.cached_property
    def _backward_bytes(self) -> dict[Layer, int]:
        return {layer: self.backward_bytes(layer) for layer in self.model.first_of_kind}

    def backward_bytes(self, layer: Layer) -> int:
        """Peak of the tensors that the backward of one layer allocates."""
        mlp = 0 if layer.mlp is None else 4 * self.width * self.tokens * layer.mlp.width // self.layout.tensor
        if layer.experts is not None:
            experts = layer.experts
            rows = self.expert_rows * experts.top_k
            tensors = _CLAMPED if isinstance(experts.activation, ClampedSwiGLU) else 4
            mlp += int(self.width * rows * (tensors * experts.width // self.layout.expert_tensor_ranks))
        attention = self.block_bytes(layer.attention) if self.blockwise(layer.attention) else 0
        if self.adapters is not None:
            mlp += self.adapter_memory.feed_forward_dropping_bytes(layer)
            attention = max(attention, self.adapter_memory.attention_dropping_bytes(layer))
        return max(mlp, attention)

    def block_bytes(self, attention: Attention) -> int:
        """Peak of the backward of one block of queries: its scores with a soft cap, or with sinks its wider heads."""
        length = min(self.batch.tokens // self.batch.rows, self.config.seq_length)
        rows = self.batch.rows if self.config.batching_in_use == "padded" else 1
        queries = min(block_size(attention.window, attention.softcap), length)
        heads = rows * self.share(attention).queries * min(length, queries + (attention.window or length))
        if attention.softcap is not None:
            return _SCORES * FP32 * heads * queries
        return _WIDER * self.width * heads * attention.head_dim if attention.sinks else 0

    def mask_bytes(self) -> int:
        """Masks: one for each window in use and, on CPUs, one for suffixes and for the chunks of context ranks."""
        attentions = dict.fromkeys(layer.attention for layer in self.model.first_of_kind)
        blocks = {
            (block_size(each.window, each.softcap), each.window or 0, FP32 if each.softcap else self.width)
            for each in attentions
            if self.blockwise(each)
        }
        masks = sum(size * (size + (window or size) - 1) * width for size, window, width in blocks)
        if self.device != "cpu" or all(map(self.blockwise, attentions)):
            return masks
        longest = self.batch.longest_branch
        if self.layout.context > 1:
            longest = self.longest_sequence
        longest = min(longest, LARGEST_MASK)
        return masks + (int(self.width * (1 << (longest - 1).bit_length()) ** 2) if longest else 0)

    def head_bytes(self) -> int:
        """Peak of the tensors that the head allocates."""
        scored = self.batch.scored // self.layout.context
        states = 2 * self.width * scored * self.model.hidden_size
        vocabulary = self.model.vocab_size // self.layout.tensor
        capped = 0 if self.model.logit_softcap is None else FP32
        if self.config.fused_logprob:
            chunk = min(scored, self.config.chunk_tokens_in_use)
            if self.device == "cuda":  # the compiled formulas of a chunk store the products and their gradients only
                return states + chunk * vocabulary * 2 * self.width
            return states + chunk * vocabulary * ((8 if self.config.bf16_in_use else 4) + capped)
        return states + scored * vocabulary * (8 + capped)
