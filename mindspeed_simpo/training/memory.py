"""How much memory a rank will need, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.data.largest import LargestPass, PassShape
from mindspeed_simpo.device import DeviceName
from mindspeed_simpo.model.blockwise import block_size
from mindspeed_simpo.model.description import Attention, HeadShare, Layer, ModelDescription
from mindspeed_simpo.model.naming import Chunk, pipeline_chunks

_FP32 = 4
_SCORES = 3
"""Tensors of the size of a block's scores that are there at once where these have a soft cap."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank of a pipeline stage."""

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """What autograd keeps for the backward, the head's share left out."""
    head: int
    """Logits and what belongs to them, for the moment that they exist."""
    backward: int
    """Gradients inside of a layer while its backward runs; no longer at the same time as ``head``."""

    @property
    def total(self) -> int:
        """The most at one time; libraries, communication buffers and fragmentation come on top."""
        lasting = self.parameters + self.gradients + self.optimizer + self.activations
        return lasting + max(self.head, self.backward)


def estimate_memory(
    model: ModelDescription, config: Config, layout: Layout, largest: LargestPass, device: DeviceName
) -> list[MemoryEstimate]:
    """Memory of one rank of each pipeline stage, bytes.

    With P parameters on the rank, b bytes of the compute dtype (2 in bf16, else 4), t tensor ranks, d data ranks:

    - parameters ``P b``; gradients ``4 P``, accumulated in fp32;
    - optimizer ``8 P`` (Adam's moments), and ``4 P`` more for the fp32 parameters of bf16; divided by the data and
      context ranks with ``use_distributed_optimizer``;
    - activations ``n (layers a + b hidden) s``: n tokens of a pass on this context rank, s passes in flight
      (``stages - stage``, with virtual stages as many as megatron-core's interleaved schedule warms up, at most
      all of them), and a what one layer keeps for a token, ``b (4 hidden + 3 ffn / t)``, ``b hidden`` for each norm
      after a block, and the attention's (``_Run.attention_bytes``); ``hidden`` over t too with ``sequence_parallel``.
      A recomputed layer keeps ``b hidden``; one group of layers is whole while it is recomputed. Rotary tables, the
      masks of windows and, on CPUs, the mask of branches are kept once;
    - head, on the last stage: of r response tokens the states ``2 b r hidden`` and the logits, ``8 r vocabulary / t``
      whole, or with ``fused_logprob`` ``(4, in bf16 8) vocabulary / t`` of at most ``logprob_chunk_tokens`` of them;
    - backward ``4 b n ffn / t``: what SwiGLU's makes while its layer is still there; or where scores have a soft cap
      those of one block of queries, three times, if that is more.

    Args:
        model: Whose layers count each for itself.
        config: Batch, precision and recompute options.
        layout: Degrees of the axes.
        largest: Of the run.
        device: Whose attention runs.

    Returns:
        One estimate a stage, first to last.
    """
    chunks = pipeline_chunks(model, layout.pipeline, config.virtual_pipeline_size(model.num_layers) or 1)
    stages = [[chunk for chunk in chunks if chunk.pipeline_rank == stage] for stage in range(layout.pipeline)]
    run = _Run(model, config, layout, largest, device)
    return [run.stage(stage) for stage in stages]


def count_parameters(model: ModelDescription, chunks: Sequence[Chunk], tensor_ranks: int = 1) -> int:
    """Parameters of the chunks on the first of ``tensor_ranks`` ranks, padding included where these do not divide."""
    return sum(math.prod(slot.shape(0, tensor_ranks)) for chunk in chunks for slot in chunk.slots(model))


@dataclass(frozen=True)
class _Run:
    """The shapes that every formula takes."""

    model: ModelDescription
    config: Config
    layout: Layout
    largest: LargestPass
    device: DeviceName

    @property
    def width(self) -> int:
        """Bytes of the compute dtype."""
        return 2 if self.config.bf16 else 4

    @property
    def batch(self) -> PassShape:
        """The largest pass."""
        return self.largest.shape

    @property
    def tokens(self) -> int:
        """Of the largest pass, on one context rank."""
        return self.batch.tokens // self.layout.context

    @property
    def hidden(self) -> int:
        """Values of the residual stream of one token on this rank."""
        return self.model.hidden_size // (self.layout.tensor if self.config.sequence_parallel else 1)

    def stage(self, chunks: Sequence[Chunk]) -> MemoryEstimate:
        count = count_parameters(self.model, chunks, self.layout.tensor)
        shards = self.layout.data * self.layout.context if self.config.use_distributed_optimizer else 1
        return MemoryEstimate(
            stage=chunks[0].pipeline_rank,
            parameters=self.width * count,
            gradients=_FP32 * count,
            optimizer=(12 if self.config.bf16 else 8) * count // shards,
            activations=self.activation_bytes(chunks) + self.mask_bytes(),
            head=self.head_bytes() if chunks[-1].has_head else 0,
            backward=max(self.backward_bytes(layer) for chunk in chunks for layer in chunk.layers(self.model)),
        )

    def activation_bytes(self, chunks: Sequence[Chunk]) -> int:
        """What all micro-batches in flight keep, and one group of layers more where it is recomputed."""
        kept, recomputed = zip(*(self.chunk_bytes(chunk) for chunk in chunks), strict=True)
        stages, number = self.layout.pipeline, len(chunks)
        behind = stages - chunks[0].pipeline_rank - 1
        if number == 1:
            tokens = self.largest.in_flight[behind]
            return int(kept[0] * tokens // self.batch.tokens + recomputed[0])
        # virtual stages pad all micro-batches of a step alike
        warm_up = 2 * behind + (number - 1) * stages
        in_flight = min(self.largest.passes * number, warm_up + 1)
        return int(sum(kept) * in_flight // number + max(recomputed))

    def chunk_bytes(self, chunk: Chunk) -> tuple[int, int]:
        """What the layers of a chunk keep of one micro-batch, and what comes to it while some are recomputed."""
        residual = self.width * self.tokens * self.hidden
        layers = chunk.layers(self.model)
        wholes = [self.layer_bytes(layer) for layer in layers]
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
            both = [[self.attention_bytes(layer.attention, recomputed=r) for r in (False, True)] for layer in layers]
            return tables + sum(wholes) - sum(kept - left for kept, left in both) + residual, 0
        return tables + sum(wholes) + residual, 0

    def layer_bytes(self, layer: Layer) -> int:
        """What one layer keeps that is not recomputed."""
        residual = self.width * self.tokens * self.hidden
        whole = 4 * residual + 3 * self.width * self.tokens * layer.mlp.width // self.layout.tensor
        norms_after = sum(norm is not None for norm in (layer.norm_after_attention, layer.norm_after_mlp))
        whole += norms_after * residual + (2 + norms_after) * _FP32 * self.tokens
        return whole + self.attention_bytes(layer.attention, recomputed=False)

    def share(self, attention: Attention) -> HeadShare:
        """Heads of the first tensor-parallel rank."""
        return attention.share(0, self.layout.tensor)

    def blockwise(self, attention: Attention) -> bool:
        """Whether it is computed in blocks, which keep queries, keys and values alone."""
        if self.device == "npu":
            return False
        longest = self.config.seq_length
        if self.config.batching_in_use == "padded":
            longest = self.batch.tokens // self.batch.rows
        return attention.softcap is not None or (attention.window or longest) < longest

    def attention_bytes(self, attention: Attention, *, recomputed: bool) -> int:
        """What the attention of one layer keeps between its two products with weights.

        With q values of queries and k of keys a token: rotated queries and keys and the undivided projection, of which
        values are a view, ``2 q + 3 k``; the result, ``q``, again where documents' results are joined; a number or
        more a head for the softmax, unless it is computed in blocks. Context ranks hold the gathered keys and values
        instead, ``2 k`` a token of all; branches their prefixes' and their own, ``2 k``. Where heads share keys, the
        kernel of CPUs takes copies of them: ``2 q`` in the place of ``3 k`` and of each ``2 k``. Ranks that share a
        key-value head hold its gathered keys and values besides, ``2 k``.
        """
        batch, context, share = self.batch, self.layout.context, self.share(attention)
        queries, keys = share.padded_queries * attention.head_dim, share.kv_heads * attention.head_dim
        gathered = context > 1 and self.config.context_parallel_algo == "gathered"
        joined = gathered or self.config.batching_in_use != "padded"
        shared = share.queries > share.kv_heads
        normed = attention.qk_norm is not None
        # queries of several groups do not lie end to end in the projection: the norm keeps a copy
        queries_again = queries if normed and shared and share.kv_heads > 1 else 0
        blockwise = self.blockwise(attention)
        mixed = queries + (2 * keys if share.kv_parts == 1 else 2 * keys // share.kv_parts + 2 * keys)
        if recomputed:
            per_token = queries + keys + mixed + queries + queries_again
            return self.width * self.tokens * per_token
        branch_keys = batch.prefixes + batch.branch_tokens if batch.longest_branch else 0
        values = self.tokens * (2 * queries + (queries if joined else 0))
        copied = shared and self.device == "cpu" and not blockwise
        if copied:
            seen = self.tokens - batch.branch_tokens + branch_keys
            if gathered:  # two chunks, each with copies of the keys up to its end
                seen = self.tokens * (2 * context + 1) // 2
            values += 2 * queries * seen + (self.tokens * (mixed + queries_again) if normed else 0)
        elif gathered:
            values += 2 * keys * self.tokens * context + (self.tokens * mixed if normed else 0)
        else:
            values += self.tokens * (keys + mixed) + 2 * keys * branch_keys
        if not copied:
            values += self.tokens * queries_again
        # npu_fusion_attention keeps a maximum and a sum, eight times each
        softmax = self.tokens * share.queries * _FP32 * (16 if self.device == "npu" else 1)
        norms = self.tokens * (share.queries + share.kv_heads) * _FP32 if normed else 0
        order = 8 * batch.tokens // batch.rows if gathered else 0
        return self.width * values + (0 if blockwise else softmax) + norms + order

    def backward_bytes(self, layer: Layer) -> int:
        """The most that the backward of one layer makes besides what is kept."""
        mlp = 4 * self.width * self.tokens * layer.mlp.width // self.layout.tensor
        attention, share = layer.attention, self.share(layer.attention)
        if attention.softcap is None or not self.blockwise(attention):
            return mlp
        length = min(self.batch.tokens // self.batch.rows, self.config.seq_length)
        rows = self.batch.rows if self.config.batching_in_use == "padded" else 1
        queries = min(block_size(attention.window, attention.softcap), length)
        keys = min(length, queries + (attention.window or length))
        return max(mlp, _SCORES * _FP32 * rows * share.queries * queries * keys)

    def mask_bytes(self) -> int:
        """The floating-point masks: of each window in use, and of the branches on CPUs."""
        attentions = dict.fromkeys(layer.attention for layer in self.model.layers)
        blocks = {
            (block_size(each.window, each.softcap), each.window or 0, _FP32 if each.softcap else self.width)
            for each in attentions
            if self.blockwise(each)
        }
        masks = sum(size * (size + (window or size) - 1) * width for size, window, width in blocks)
        if self.device != "cpu" or not self.batch.longest_branch or all(map(self.blockwise, attentions)):
            return masks
        return masks + int(self.width * (1 << (self.batch.longest_branch - 1).bit_length()) ** 2)

    def head_bytes(self) -> int:
        """The most that exists at once behind the last layer."""
        scored = self.batch.scored // self.layout.context
        states = 2 * self.width * scored * self.model.hidden_size
        vocabulary = self.model.vocab_size // self.layout.tensor
        if self.config.fused_logprob:
            chunk = min(scored, self.config.logprob_chunk_tokens)
            return states + chunk * vocabulary * (8 if self.config.bf16 else 4)
        return states + scored * vocabulary * 8
