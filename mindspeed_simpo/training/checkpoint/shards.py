"""What each rank holds of the state of training: fp32 parameters and Adam's moments, without a gather."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from mindspeed_simpo.model.megatron.weights import unwrap
from mindspeed_simpo.model.slots import Slot
from mindspeed_simpo.parallel.groups import Shards

PARAMETER = "parameter"
MOMENTS = ("exp_avg", "exp_avg_sq")


def name_of(kind: str, tensor: str, offsets: Sequence[int]) -> str:
    """Name of a piece in a rank's file, such as ``exp_avg|model.norm.weight|0``."""
    return f"{kind}|{tensor}|{','.join(map(str, offsets))}"


@dataclass(frozen=True)
class OptimizerShard:
    """This rank's part of a parameter in the optimizer: elements ``start`` to ``stop - 1`` of the flat parameter."""

    state: dict[str, Any]
    """State of Adam; empty before the first update."""
    main: Tensor
    """fp32 main parameter; for an fp32 parameter the parameter or a view of it."""
    start: int
    stop: int
    is_copied: bool
    """Whether all copies of the parameter have the same elements of the optimizer's state."""


def named_slots(models: Sequence[torch.nn.Module]) -> Iterator[tuple[Slot, torch.nn.Parameter]]:
    """The slots of what a checkpoint holds, on this rank, with their parameters."""
    for model in map(unwrap, models):
        for slot in model.stored_slots:
            yield slot, model.get_parameter(slot.parameter)


def optimizer_shard(optimizer: Any, parameter: torch.nn.Parameter) -> OptimizerShard | None:
    """This rank's shard; None where the other data-parallel ranks hold all of the parameter's state.

    Args:
        optimizer: Optimizer of megatron-core.
        parameter: A parameter; of a frozen one every rank holds all values, and the optimizer no state.
    """
    if not parameter.requires_grad:
        return OptimizerShard({}, parameter, 0, parameter.numel(), is_copied=True)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not isinstance(part, DistributedOptimizer):
            main = getattr(parameter, "main_param", parameter)
            if any(main is each for group in part.param_groups for each in group["params"]):
                return OptimizerShard(part.optimizer.state[main], main, 0, parameter.numel(), is_copied=True)
            continue
        place = part.model_param_group_index_map.get(parameter)
        if place is not None:
            group, index = place
            main = part.optimizer.param_groups[group]["params"][index]
            held = part._get_model_param_range_map(parameter)["param"]
            return OptimizerShard(part.optimizer.state[main], main, held.start, held.end, is_copied=False)
    return None


def written_range(shard: OptimizerShard, shards: Shards) -> tuple[int, int]:
    """The elements of the flat parameter that this rank writes: of copies, each rank writes an equal share.

    Args:
        shard: This rank's shard.
        shards: The ranks that hold the parameter.
    """
    if not shard.is_copied:
        return shard.start, shard.stop
    return shard.stop * shards.copy // shards.copies, shard.stop * (shards.copy + 1) // shards.copies
