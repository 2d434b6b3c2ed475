"""Degrees -> process groups. Rooms above take groups as arguments; nobody reads megatron's globals."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch.distributed as dist

from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.device import Device


@dataclass(frozen=True)
class Groups:
    """This rank's process group of every parallel axis. A group of one rank is a group too."""

    world: dist.ProcessGroup
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    context: dist.ProcessGroup
    data: dist.ProcessGroup
    """Ranks that see other pairs and hold the same weights (context-parallel ranks are not among them)."""
    model: dist.ProcessGroup
    """Ranks that share one copy of the model: tensor and pipeline axes."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pipeline.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head, and so computes log-probabilities and the loss."""
        return self.pipeline.rank() == self.pipeline.size() - 1

    @property
    def counts_its_loss(self) -> bool:
        """Whether this rank's loss counts in a sum over the world: on the last stage, one of all that hold copies."""
        return self.is_last_stage and self.tensor.rank() == 0 and self.context.rank() == 0


def initialize(layout: Layout, device: Device, timeout_minutes: float = 10.0) -> Groups:
    """Join the ranks (``RANK``, ``WORLD_SIZE``, ``MASTER_*`` of the environment) and divide them as ``layout`` says.

    A process that no launcher started is a world of one rank.
    """
    from megatron.core import parallel_state

    timeout = datetime.timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group(device.backend, timeout=timeout)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(device.backend, store=store, rank=0, world_size=1, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        create_gloo_process_groups=not device.is_cpu,
        distributed_timeout_minutes=timeout_minutes,
    )
    world = dist.group.WORLD
    assert world is not None
    return Groups(
        world=world,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
    )


def consecutive_ranks(number: int) -> dist.ProcessGroup:
    """A new group of ``number`` tensor-parallel ranks, from a multiple of it on; a collective of the world.

    megatron-core numbers tensor-parallel ranks first, so that consecutive ones are consecutive in the world.

    Args:
        number: Divides the tensor-parallel ranks.
    """
    world = range(dist.get_world_size())
    found = [dist.new_group(list(world[first : first + number])) for first in world[::number]]
    own: dist.ProcessGroup = found[dist.get_rank() // number]
    return own


def seed_model_ranks(seed: int) -> None:
    """Give megatron-core's layers their random state, another for each tensor-parallel rank."""
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Forget the groups and leave the world; safe where ``initialize`` did not get to its end."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
