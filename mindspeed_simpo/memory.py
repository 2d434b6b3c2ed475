"""How much memory a rank will need, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindspeed_simpo.config import Config, Layout
from mindspeed_simpo.model.hf_config import ModelSpec
from mindspeed_simpo.model.naming import Chunk, pipeline_chunks


@dataclass(frozen=True)
class BatchShape:
    """Longest sequences that a micro-batch can meet, tokens."""

    pair: int
    """Prompt and longer response."""
    chosen: int
    rejected: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank of a pipeline stage."""

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of the parts; libraries, communication buffers and fragmentation come on top."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits


def estimate_memory(spec: ModelSpec, config: Config, layout: Layout, batch: BatchShape) -> list[MemoryEstimate]:
    """Memory of one rank of each pipeline stage, bytes.

    With P parameters on the rank, b bytes of the compute dtype (2 in bf16, else 4), t tensor ranks, d data ranks:

    - parameters ``P b``; gradients ``4 P``, accumulated in fp32;
    - optimizer ``8 P`` (Adam's moments), and ``4 P`` more for the fp32 parameters of bf16; divided by the data and
      context ranks with ``use_distributed_optimizer``;
    - activations ``b n s (layers a + hidden)`` with n the tokens of a micro-batch (see :func:`_tokens`; half of them
      with ``pair_schedule: two_pass``), divided by the context ranks, s the micro-batches in flight
      (``stages - stage``, with virtual stages as many as megatron-core's interleaved schedule warms up, at most all of
      them), and a the values that one layer keeps for its backward: ``4 hidden + (4 queries + 2 keys + 4 ffn) / t``,
      plus ``(queries + keys) / t`` with query-key norms, ``queries / t + 4 head_dim`` in packed rows; ``hidden`` over
      t too with ``sequence_parallel``. A recomputed layer keeps ``hidden``; one group of layers is whole while it is
      recomputed;
    - logits ``responses vocabulary / (t x context ranks) (8 + b)`` on the last stage: fp32 probabilities, their
      gradient and the head's own output. Only response tokens reach the head, with ``two_pass`` those of one side, and
      with ``fused_logprob`` at most ``logprob_chunk_tokens`` at a time.

    Args:
        spec: Shape of the model.
        config: Batch, precision and recompute options.
        layout: Degrees of the axes.
        batch: Lengths that bound the activations.

    Returns:
        One estimate a stage, first to last.
    """
    chunks = pipeline_chunks(spec, layout.pipeline, config.virtual_stages(spec.num_layers) or 1)
    stages = [[chunk for chunk in chunks if chunk.stage == stage] for stage in range(layout.pipeline)]
    return [_of_stage(spec, config, layout, batch, stage) for stage in stages]


def count_parameters(spec: ModelSpec, chunks: Sequence[Chunk], tensor_ranks: int = 1) -> int:
    """Parameters of the chunks on one of ``tensor_ranks`` ranks, the padding of the vocabulary left out."""
    return sum(
        -(-_product(tensor.shape) // (tensor_ranks if tensor.axis is not None else 1))
        for chunk in chunks
        for slot in chunk.slots(spec)
        for tensor in slot.tensors
    )


def _of_stage(
    spec: ModelSpec, config: Config, layout: Layout, batch: BatchShape, chunks: Sequence[Chunk]
) -> MemoryEstimate:
    width = 2 if config.bf16 else 4
    count = count_parameters(spec, chunks, layout.tensor)
    shards = layout.data * layout.context if config.use_distributed_optimizer else 1
    tokens, responses = (number // layout.context for number in _tokens(config, layout, batch))
    if config.pair_schedule == "two_pass":
        tokens //= 2
        responses = responses * max(batch.chosen, batch.rejected) // max(1, batch.chosen + batch.rejected)
    if config.fused_logprob:
        responses = min(responses, config.logprob_chunk_tokens)
    kept = sum(_layer_values(spec, config, layout, chunk.num_layers) + spec.hidden_size for chunk in chunks)
    return MemoryEstimate(
        stage=chunks[0].stage,
        parameters=width * count,
        gradients=4 * count,
        optimizer=(12 if config.bf16 else 8) * count // shards,
        activations=width * tokens * kept * _chunks_in_flight(config, layout, chunks) // len(chunks),
        logits=responses * spec.vocab_size // layout.tensor * (8 + width) if chunks[-1].has_head else 0,
    )


def _tokens(config: Config, layout: Layout, batch: BatchShape) -> tuple[int, int]:
    """Tokens of the largest micro-batch, and those of its responses.

    Padded, every sequence is taken to be the longest. Packed, a micro-batch is as large as its budget, but no larger
    than the pairs of its rank can make it, and no smaller than the largest pair.
    """
    responses = batch.chosen + batch.rejected
    if config.batching_in_use == "padded":
        return 2 * config.micro_batch_size * batch.pair, config.micro_batch_size * responses
    shared = config.batching_in_use == "prefix_shared"
    pair = batch.pair + min(batch.chosen, batch.rejected) if shared else 2 * batch.pair
    pairs = config.global_batch_size // layout.data
    tokens = max(pair, min(config.token_budget, pairs * pair))
    return tokens, min(tokens, pairs * responses)


def _chunks_in_flight(config: Config, layout: Layout, chunks: Sequence[Chunk]) -> int:
    """Micro-batches of one chunk each whose backward is still to come, at most."""
    pairs = config.global_batch_size // layout.data
    micro_batches = layout.num_microbatches if config.batching_in_use == "padded" else pairs
    behind = layout.pipeline - chunks[0].stage - 1
    warm_up = behind if len(chunks) == 1 else 2 * behind + (len(chunks) - 1) * layout.pipeline
    return min(micro_batches * len(chunks), warm_up + 1)


def _layer_values(spec: ModelSpec, config: Config, layout: Layout, layers: int) -> int:
    """Values that the layers of a chunk keep for one token."""
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    split = 4 * queries + 2 * keys + 4 * spec.ffn_size + (queries + keys if spec.qk_norm else 0)
    hidden = spec.hidden_size // (layout.tensor if config.sequence_parallel else 1)
    whole = 4 * hidden + split // layout.tensor
    if config.batching_in_use != "padded":  # the documents' contexts joined, and angles that no two tokens share
        whole += queries // layout.tensor + 4 * spec.head_dim
    if config.recompute_granularity != "full":
        return layers * whole
    group = min(config.recompute_num_layers or 1, layers)
    if config.recompute_method == "block":  # the first `group` layers are recomputed, one at a time
        return group * hidden + max(1, layers - group) * whole
    return -(-layers // group) * hidden + group * whole


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
