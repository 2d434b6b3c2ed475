"""How much memory a rank will need, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.data.largest import LargestPass, PassShape
from mindspeed_simpo.device import DeviceName
from mindspeed_simpo.model.description import ModelSpec
from mindspeed_simpo.model.naming import Chunk, pipeline_chunks

_FP32 = 4


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
    spec: ModelSpec, config: Config, layout: Layout, largest: LargestPass, device: DeviceName
) -> list[MemoryEstimate]:
    """Memory of one rank of each pipeline stage, bytes.

    With P parameters on the rank, b bytes of the compute dtype (2 in bf16, else 4), t tensor ranks, d data ranks:

    - parameters ``P b``; gradients ``4 P``, accumulated in fp32;
    - optimizer ``8 P`` (Adam's moments), and ``4 P`` more for the fp32 parameters of bf16; divided by the data and
      context ranks with ``use_distributed_optimizer``;
    - activations ``n (layers a + b hidden) s``: n tokens of a pass on this context rank, s passes in flight
      (``stages - stage``, with virtual stages as many as megatron-core's interleaved schedule warms up, at most
      all of them), and a what one layer keeps for a token, ``b (4 hidden + 3 ffn / t)`` and the attention's
      (``_Run.attention_bytes``); ``hidden`` over t too with ``sequence_parallel``. A recomputed layer keeps
      ``b hidden``; one group of layers is whole while it is recomputed. Rotary tables and, on CPUs, the mask of
      branches are kept once;
    - head, on the last stage: of r response tokens the states ``2 b r hidden`` and the logits, ``8 r vocabulary / t``
      whole, or with ``fused_logprob`` ``(4, in bf16 8) vocabulary / t`` of at most ``logprob_chunk_tokens`` of them;
    - backward ``4 b n ffn / t``: what SwiGLU's makes while its layer is still there.

    Args:
        spec: Shape of the model.
        config: Batch, precision and recompute options.
        layout: Degrees of the axes.
        largest: Of the run.
        device: Whose attention runs.

    Returns:
        One estimate a stage, first to last.
    """
    chunks = pipeline_chunks(spec, layout.pipeline, config.virtual_stages(spec.num_layers) or 1)
    stages = [[chunk for chunk in chunks if chunk.stage == stage] for stage in range(layout.pipeline)]
    run = _Run(spec, config, layout, largest, device)
    return [run.stage(stage) for stage in stages]


def count_parameters(spec: ModelSpec, chunks: Sequence[Chunk], tensor_ranks: int = 1) -> int:
    """Parameters of the chunks on one of ``tensor_ranks`` ranks, the padding of the vocabulary left out."""
    return sum(
        -(-_product(tensor.shape) // (tensor_ranks if tensor.axis is not None else 1))
        for chunk in chunks
        for slot in chunk.slots(spec)
        for tensor in slot.tensors
    )


@dataclass(frozen=True)
class _Run:
    """The shapes that every formula takes."""

    spec: ModelSpec
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
        return self.spec.hidden_size // (self.layout.tensor if self.config.sequence_parallel else 1)

    def stage(self, chunks: Sequence[Chunk]) -> MemoryEstimate:
        count = count_parameters(self.spec, chunks, self.layout.tensor)
        shards = self.layout.data * self.layout.context if self.config.use_distributed_optimizer else 1
        return MemoryEstimate(
            stage=chunks[0].stage,
            parameters=self.width * count,
            gradients=_FP32 * count,
            optimizer=(12 if self.config.bf16 else 8) * count // shards,
            activations=self.activation_bytes(chunks) + self.mask_bytes(),
            head=self.head_bytes() if chunks[-1].has_head else 0,
            backward=4 * self.width * self.tokens * self.spec.ffn_size // self.layout.tensor,
        )

    def activation_bytes(self, chunks: Sequence[Chunk]) -> int:
        """What all micro-batches in flight keep, and one group of layers more where it is recomputed."""
        kept, recomputed = zip(*(self.chunk_bytes(chunk) for chunk in chunks), strict=True)
        stages, number = self.layout.pipeline, len(chunks)
        behind = stages - chunks[0].stage - 1
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
        whole = 4 * residual + 3 * self.width * self.tokens * self.spec.ffn_size // self.layout.tensor
        whole += 2 * _FP32 * self.tokens + self.attention_bytes(recomputed=False)
        angles = self.tokens // (self.batch.rows if self.config.batching_in_use == "padded" else 1)
        tables = 2 * self.width * angles * self.spec.head_dim
        layers = chunk.num_layers
        if self.config.recompute_granularity == "full":
            group = min(self.config.recompute_num_layers or 1, layers)
            if self.config.recompute_method == "block":  # the first `group` layers are recomputed, one at a time
                left = layers - group
                return tables + (group + 1) * residual + left * whole, 0 if left else whole - 2 * residual
            return tables + (-(-layers // group) + 1) * residual, group * whole - 2 * residual
        if self.config.recompute_granularity == "selective":
            saved = self.attention_bytes(recomputed=False) - self.attention_bytes(recomputed=True)
            return tables + layers * (whole - saved) + residual, 0
        return tables + layers * whole + residual, 0

    def attention_bytes(self, *, recomputed: bool) -> int:
        """What the attention of one layer keeps between its two products with weights.

        With q values of queries and k of keys a token: rotated queries and keys and the undivided projection, of which
        values are a view, ``2 q + 3 k``; the result, ``q``, again where documents' results are joined; a number or
        more a head for the softmax. Context ranks hold the gathered keys and values instead, ``2 k`` a token of all;
        branches their prefixes' and their own, ``2 k``. Where heads share keys, the kernel of CPUs takes copies of
        them: ``2 q`` in the place of ``3 k`` and of each ``2 k``.
        """
        spec, batch, context = self.spec, self.batch, self.layout.context
        queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        gathered = context > 1 and self.config.context_parallel_algo == "gathered"
        joined = gathered or self.config.batching_in_use != "padded"
        shared = spec.num_heads > spec.num_kv_heads
        mixed = queries + 2 * keys
        if recomputed:
            per_token = queries + keys + mixed + queries + (queries if spec.qk_norm and shared else 0)
            return self.width * self.tokens * per_token // self.layout.tensor
        branch_keys = batch.prefixes + batch.branch_tokens if batch.longest_branch else 0
        values = self.tokens * (2 * queries + (queries if joined else 0))
        if shared and self.device == "cpu":
            seen = self.tokens - batch.branch_tokens + branch_keys
            if gathered:  # two chunks, each with copies of the keys up to its end
                seen = self.tokens * (2 * context + 1) // 2
            values += 2 * queries * seen + (self.tokens * (mixed + queries) if spec.qk_norm else 0)
        elif gathered:
            values += 2 * keys * self.tokens * context + (self.tokens * mixed if spec.qk_norm else 0)
        else:
            values += self.tokens * (keys + mixed) + 2 * keys * branch_keys
        if spec.qk_norm and shared and self.device != "cpu":
            values += self.tokens * queries
        # npu_fusion_attention keeps a maximum and a sum, eight times each
        softmax = self.tokens * spec.num_heads * _FP32 * (16 if self.device == "npu" else 1)
        norms = self.tokens * (spec.num_heads + spec.num_kv_heads) * _FP32 if spec.qk_norm else 0
        order = 8 * batch.tokens // batch.rows if gathered else 0
        return (self.width * values + softmax + norms) // self.layout.tensor + order

    def mask_bytes(self) -> int:
        """The floating-point mask that branches need on CPUs."""
        if self.device != "cpu" or not self.batch.longest_branch:
            return 0
        return self.width * (1 << (self.batch.longest_branch - 1).bit_length()) ** 2

    def head_bytes(self) -> int:
        """The most that exists at once behind the last layer."""
        scored = self.batch.scored // self.layout.context
        states = 2 * self.width * scored * self.spec.hidden_size
        vocabulary = self.spec.vocab_size // self.layout.tensor
        if self.config.fused_logprob:
            chunk = min(scored, self.config.logprob_chunk_tokens)
            return states + chunk * vocabulary * (8 if self.config.bf16 else 4)
        return states + scored * vocabulary * 8


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
