"""Process groups from the degrees of parallelism. Code takes groups as arguments and reads no megatron-core global."""

from __future__ import annotations

import datetime
import itertools
import os
from dataclasses import dataclass

import torch.distributed as dist

from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.device import Device

WAIT = datetime.timedelta(hours=24)
"""Time limit of waits outside training; a lost rank ends them at once, because gloo sees its closed connection."""


@dataclass(frozen=True)
class Shards:
    """The ranks that hold a parameter: those that hold one part each, and those with the same part."""

    group: dist.ProcessGroup
    """Ranks with the parts; where every tensor-parallel rank has all of the parameter, the tensor-parallel ranks."""
    copy: int
    """Number of this rank among those with the same part, from 0."""
    copies: int
    """Number of ranks with the same part."""

    @property
    def rank(self) -> int:
        """Number of this rank's part."""
        return self.group.rank()

    @property
    def size(self) -> int:
        """Number of parts."""
        return self.group.size()


@dataclass(frozen=True)
class Groups:
    """This rank's process group of every parallel axis; an axis of degree 1 has a group of one rank."""

    world: dist.ProcessGroup
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    context: dist.ProcessGroup
    data: dist.ProcessGroup
    """Ranks with the same weights and other pairs; context-parallel ranks, which have the same pairs, are excluded."""
    control: dist.ProcessGroup
    """All ranks, over gloo and with a long time limit: for waits on a disk, the network or another rank's work."""
    saving: dist.ProcessGroup
    """As ``control``, for the thread that writes checkpoints."""
    experts: Shards | None = None
    """The ranks that hold a layer's experts, among the tensor-, context- and data-parallel ranks of this pipeline rank:
    the expert-tensor- and expert-parallel ranks together, of which the former vary fastest, hold the parts. None in the
    plug-in."""
    expert_tensor: dist.ProcessGroup | None = None
    """The ranks that divide each expert of this rank; None in the plug-in."""

    @property
    def expert_tensor_ranks(self) -> int:
        """Number of ranks that divide each expert."""
        return 1 if self.expert_tensor is None else self.expert_tensor.size()

    def shards(self, *, experts: bool) -> Shards:
        """The ranks of this pipeline rank that hold a parameter.

        Args:
            experts: Whether it is a parameter of experts.
        """
        if experts:
            assert self.experts is not None, "the plug-in holds no experts"
            return self.experts
        copy = self.data.rank() * self.context.size() + self.context.rank()
        return Shards(self.tensor, copy, self.data.size() * self.context.size())

    @property
    def is_first_pipeline_rank(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pipeline.rank() == 0

    @property
    def is_last_pipeline_rank(self) -> bool:
        """Whether this rank holds the head, and so computes log-probabilities and the loss."""
        return self.pipeline.rank() == self.pipeline.size() - 1

    @property
    def contributes_loss(self) -> bool:
        """Whether this rank adds its loss to a sum over the world.

        Among the last pipeline rank's tensor- and context-parallel ranks, which hold replicas of the loss, only the
        first one does.
        """
        return self.is_last_pipeline_rank and self.tensor.rank() == 0 and self.context.rank() == 0


def initialize(layout: Layout, device: Device, timeout_minutes: float = 10.0) -> Groups:
    """Set up ``torch.distributed`` and megatron-core's process groups; a collective of the world.

    The rendezvous is that of ``RANK``, ``WORLD_SIZE`` and ``MASTER_*`` in the environment. Without ``RANK`` the world
    has one rank.

    Args:
        layout: Degrees of the parallel axes.
        device: Its backend runs the collectives.
        timeout_minutes: After this time a collective fails.
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
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor_ranks,
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
        control=dist.new_group(backend="gloo", timeout=WAIT),
        saving=dist.new_group(backend="gloo", timeout=WAIT),
        experts=Shards(
            parallel_state.get_expert_tensor_and_model_parallel_group(),
            parallel_state.get_expert_data_parallel_rank(),
            parallel_state.get_expert_data_parallel_world_size(),
        ),
        expert_tensor=parallel_state.get_expert_tensor_parallel_group(),
    )


class FirstRankFirst:
    """Waits of ranks for global rank 0, which may be at work on a disk, through the store of the rendezvous.

    Unlike a barrier it needs no other rank than those that wait. All ranks make their instances in one order.
    """

    _made = itertools.count()

    def __init__(self) -> None:
        self._number = next(self._made)

    def wait(self, name: str) -> None:
        """Return once global rank 0 has made a call with this name."""
        store = dist.distributed_c10d._get_default_store()
        key = f"first-rank/{self._number}/{name}"
        if dist.get_rank() == 0:
            store.set(key, "")
        else:
            store.wait([key], WAIT)


def consecutive_ranks(number: int) -> dist.ProcessGroup:
    """A new group of ``number`` consecutive tensor-parallel ranks, this rank among them; a collective of the world.

    In megatron-core's rank order the tensor-parallel axis varies fastest, so consecutive tensor-parallel ranks are
    consecutive world ranks. The first rank of each group is a multiple of ``number``.

    Args:
        number: Ranks of the group; a divisor of the tensor-parallel degree.
    """
    world = range(dist.get_world_size())
    found = [dist.new_group(list(world[first : first + number])) for first in world[::number]]
    own: dist.ProcessGroup = found[dist.get_rank() // number]
    return own


def seed_model_ranks(seed: int) -> None:
    """Seed the random state of megatron-core's layers, differently on each tensor-parallel rank."""
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Destroy all process groups; also correct where :func:`initialize` raised before its end."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
