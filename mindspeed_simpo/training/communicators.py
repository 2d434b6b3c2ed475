"""The communicators of HCCL that one rank makes in a run, and the memory of their buffers."""

from __future__ import annotations

from typing import NamedTuple

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.device import npu_environment
from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.model.naming import pipeline_chunks

_ALWAYS = 2
"""The groups of the world, and of the data and context ranks."""


class Communicators(NamedTuple):
    """Numbers of communicators; HCCL makes one at the first use."""

    collective: int
    """Process groups with collectives or batches of messages, also those of one rank."""
    pairs: int
    """Process groups and peers with messages outside of batches."""
    groups_of_pairs: int
    """Process groups of ``pairs`` that are not among ``collective``."""


def communicators(model: ModelDescription, config: Config, layout: Layout, pipeline_rank: int) -> Communicators:
    """Communicators of a rank in a training step.

    Collectives need the groups of ``_ALWAYS``; without the distributed optimizer, whose gradient norm is summed over
    the world, that of the ranks with the parts of the model; those of the tensor and context ranks, on the last
    pipeline rank, whose head uses it, also a group of one tensor rank; one for each number of ranks that share a
    key-value head; and on the first and last pipeline rank one for a tied embedding. Without virtual pipeline ranks the
    messages of the pipeline are batches in its group. With them each message is a call of its own, and a pipeline of
    two ranks uses two groups; the messages in the ring of context ranks are calls of their own, too. A rank with
    experts needs the groups of the ranks with the same experts and, where there are several, of those with the others;
    and without the distributed optimizer the gradient norm of experts has a group of its own.

    Args:
        model: The description.
        config: The context-parallel algorithm and virtual pipeline ranks.
        layout: Degrees of the parallel axes.
        pipeline_rank: The rank's place in the pipeline.

    Source: ``pointToPoint`` and ``batch_isend_irecv`` of torch_npu's ``ProcessGroupHCCL.cpp``;
    ``pipeline_parallel/p2p_communication.py`` of megatron-core.
    """
    shared = {layer.attention.share(0, layout.tensor).kv_parts for layer in model.first_of_kind} - {1}
    is_last = pipeline_rank == layout.pipeline - 1
    at_an_end = pipeline_rank == 0 or is_last
    piped = layout.pipeline > 1
    virtual = piped and (config.virtual_pipeline_size(model.num_layers) or 1) > 1
    ring = config.context_parallel_algo == "megatron_cp_algo"
    return Communicators(
        collective=_ALWAYS
        + (not layout.distributed_optimizer)
        + (layout.tensor > 1 or is_last)
        + (layout.context > 1)
        + len(shared)
        + (model.tied and piped and at_an_end)
        + _of_experts(model, config, layout, pipeline_rank)
        + (piped and not virtual),
        pairs=2 * virtual + (min(2, layout.context - 1) if ring else 0),
        groups_of_pairs=int(virtual),
    )


def _of_experts(model: ModelDescription, config: Config, layout: Layout, pipeline_rank: int) -> int:
    chunks = pipeline_chunks(model, layout.pipeline, config.virtual_pipeline_size(model.num_layers) or 1)
    own = [layer for chunk in chunks if chunk.pipeline_rank == pipeline_rank for layer in chunk.layers(model)]
    several = layout.expert * layout.expert_tensor_ranks > 1
    in_layers = 1 + several if any(layer.experts is not None for layer in own) else 0
    return in_layers + (model.has_experts and not layout.distributed_optimizer)


def buffer_bytes(model: ModelDescription, config: Config, layout: Layout, pipeline_rank: int) -> int:
    """Bytes of HCCL's buffers on a rank; where pairs have no communicators, messages use those of their groups.

    Args:
        model: As in :func:`communicators`, with the other arguments.
        config: As above.
        layout: As above.
        pipeline_rank: As above.

    Raises:
        ConfigError: See :func:`~mindspeed_simpo.device.npu_environment.communicator_buffers`.
    """
    number = communicators(model, config, layout, pipeline_rank)
    size = npu_environment.communicator_buffers()
    of_groups = number.collective + (0 if size.pair else number.groups_of_pairs)
    return of_groups * size.collective + number.pairs * size.pair
