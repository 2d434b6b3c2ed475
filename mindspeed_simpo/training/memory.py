"""Estimate of the memory of each rank, from shapes alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.data.largest import LargestPass
from mindspeed_simpo.device import DeviceName
from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.model.naming import Chunk, distinct_parts, pipeline_chunks
from mindspeed_simpo.training.communicators import buffer_bytes
from mindspeed_simpo.training.pass_memory import FP32, PassMemory


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    pipeline_rank: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """Tensors that autograd saves for the backward, without those of the head."""
    head: int
    """Logits and the tensors computed from them, while these exist."""
    backward: int
    """Gradients inside of a layer during the layer's backward; they do not exist at the same time as ``head``."""
    communication: int
    """Buffers of HCCL's communicators; 0 on other devices than NPUs."""

    @property
    def total(self) -> int:
        """Peak bytes, without libraries, fragmentation and, on other devices than NPUs, communication buffers."""
        lasting = self.parameters + self.gradients + self.optimizer + self.activations + self.communication
        return lasting + max(self.head, self.backward)


def estimate_memory(
    model: ModelDescription, config: Config, layout: Layout, largest: LargestPass, device: DeviceName
) -> list[MemoryEstimate]:
    """Memory, in bytes, of the first tensor-parallel rank of each pipeline rank.

    With P parameters on the rank, b bytes of the compute dtype (2 in bf16, else 4), t tensor ranks, d data ranks:

    - parameters ``P b``; gradients ``4 P``, accumulated in fp32;
    - optimizer ``8 P`` (Adam's moments), and ``4 P`` more for the fp32 parameters of bf16; divided by the data and
      context ranks with ``use_distributed_optimizer``;
    - of the parameters of experts a rank holds ``1 / (e x)``, with e expert and x expert-tensor ranks, and their
      optimizer state is divided by the ranks that hold the same ones;
    - with adapters, gradients and optimizer of the adapters alone, and parameters of both; adapters are fp32, and have
      no other fp32 parameters;
    - activations ``n (layers a + b hidden) s``: n tokens of a pass on this context rank, s passes in flight
      (``pipeline ranks - pipeline rank``; with virtual pipeline ranks the number of warm-up passes of megatron-core's
      interleaved schedule, at most all passes), and a the bytes that one layer saves for a token:
      ``b (4 hidden + 3 ffn / t)``, ``b hidden`` for each norm after a block, and those of the attention
      (:meth:`PassMemory.attention_bytes`, and of latent attention
      :func:`~mindspeed_simpo.training.latent_memory.latent_attention_bytes`); with ``sequence_parallel`` ``hidden`` is
      divided by t too. A recomputed layer saves ``b hidden``; during the recomputation one group of layers saves all
      its tensors. Rotary tables, masks of windows and, on CPUs, the mask of suffixes are stored once;
    - head, on the last pipeline rank: for r response tokens the states ``2 b r hidden`` and the logits,
      ``8 r vocabulary / t``, or with ``fused_logprob`` ``(4, in bf16 8) vocabulary / t`` for each of at most
      ``logprob_chunk_tokens`` tokens; with a softcap of the logits ``4 vocabulary / t`` more for each of them;
    - backward ``4 b n ffn / t``: the gradients of SwiGLU while the layer's saved tensors still exist, ``6 b n ffn / t``
      of the clamped one; or, where larger, three tensors of the scores of one block of queries if the scores have a
      soft cap, or with sinks six of its keys, repeated for each query head; or what dropout of the largest adapted
      input of the attention makes, and of the MLP in addition to the gradients of SwiGLU;
    - communication, on NPUs: :func:`~mindspeed_simpo.training.communicators.buffer_bytes`.

    Args:
        model: The description; layers may differ.
        config: Batch, precision and recompute options.
        layout: Degrees of the parallel axes.
        largest: The largest pass of the run.
        device: The device whose attention kernel runs.

    Returns:
        One estimate for each pipeline rank, in order.
    """
    virtual = config.virtual_pipeline_size(model.num_layers) or 1
    chunks = pipeline_chunks(model, layout.pipeline, virtual, layout.expert_tensor_ranks)
    by_rank = [[chunk for chunk in chunks if chunk.pipeline_rank == rank] for rank in range(layout.pipeline)]
    run = PassMemory(model, config, layout, largest, device)
    return [_estimate(run, chunks) for chunks in by_rank]


def count_parameters(
    model: ModelDescription, chunks: Sequence[Chunk], tensor_ranks: int = 1, *, experts: bool | None = None
) -> int:
    """Number of parameters of the chunks on the first rank, padding included.

    Args:
        model: The description.
        chunks: Chunks of one pipeline rank.
        tensor_ranks: Ranks that divide a parameter: tensor-parallel ones, or of experts, see
            :class:`~mindspeed_simpo.model.slots.Slot`.
        experts: Whether to count the parameters of experts alone, or those of the rest; None counts all.
    """
    return _of_chunks(model, tuple(chunks), tensor_ranks, experts)


@functools.lru_cache(maxsize=4096)
def _of_chunks(model: ModelDescription, chunks: tuple[Chunk, ...], tensor_ranks: int, experts: bool | None) -> int:
    parts = distinct_parts(model, chunks)
    return sum(number * _of_part(model, part, tensor_ranks, experts) for part, number in parts.items())


@functools.lru_cache(maxsize=4096)
def _of_part(model: ModelDescription, part: Chunk, tensor_ranks: int, experts: bool | None) -> int:
    slots = [slot for slot in part.slots(model) if experts in (None, slot.of_experts)]
    return sum(math.prod(slot.shape(0, tensor_ranks)) for slot in slots)


def _estimate(run: PassMemory, chunks: Sequence[Chunk]) -> MemoryEstimate:
    """Memory of one pipeline rank, which has these chunks."""
    layout, sharded = run.layout, run.config.use_distributed_optimizer
    expert_ranks, copies = layout.expert * layout.expert_tensor_ranks, layout.data * layout.context
    dense = count_parameters(run.model, chunks, layout.tensor, experts=False)
    of_experts = count_parameters(run.model, chunks, expert_ranks, experts=True)
    parameters, has_main = run.width * (dense + of_experts), run.config.bf16_in_use
    if run.adapters is not None:
        dense = run.adapters.count(run.model, chunks, layout.tensor, experts=False)
        of_experts = run.adapters.count(run.model, chunks, expert_ranks, experts=True)
        parameters, has_main = parameters + FP32 * (dense + of_experts), False
    trained = dense + of_experts
    held = dense // copies + of_experts * expert_ranks // (copies * layout.tensor) if sharded else trained
    place = chunks[0].pipeline_rank
    return MemoryEstimate(
        pipeline_rank=place,
        parameters=parameters,
        gradients=FP32 * trained,
        optimizer=(12 if has_main else 8) * held,
        activations=run.activation_bytes(chunks) + run.mask_bytes(),
        head=run.head_bytes() if chunks[-1].has_head else 0,
        backward=run.largest_backward(chunks),
        communication=buffer_bytes(run.model, run.config, run.layout, place) if run.device == "npu" else 0,
    )
