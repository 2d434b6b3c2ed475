"""Adam's state of each parameter, in the shape of the parameter, independent of how the optimizer shards the state.

A checkpoint in this form can be loaded in any other layout, with or without the distributed optimizer, and by both
supported versions of megatron-core.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")
_MAIN = "main"


@dataclass(frozen=True)
class _Shard:
    """This rank's shard of the optimizer state of a parameter: elements ``start`` to ``stop`` of the flat parameter."""

    state: dict[str, Any]
    """State of torch's Adam; empty before the first update."""
    main: Tensor
    """fp32 main parameter; for an fp32 parameter the parameter or a view of it."""
    start: int
    stop: int


def sharded_optimizer_state(
    optimizer: Any, models: Sequence[torch.nn.Module], model_state: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    """The state for ``dist_checkpointing``: ``{parameter: {moment: tensor}}`` in host memory; a collective.

    Each tensor has the shape of the parameter on this tensor-parallel rank.

    Args:
        optimizer: Optimizer of megatron-core.
        models: Pipeline chunks, unwrapped.
        model_state: ``sharded_state_dict`` of the chunks, which describes how each parameter is sharded.
        is_loading: Whether the tensors are only buffers for loading; they then have zeros.
    """
    entries = {
        id(entry.data): entry
        for entry in nested_values(model_state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    state: dict[str, Any] = {}
    for name, parameter in _parameters(models):
        shard = _shard(optimizer, parameter)
        state[name] = {
            key: make_sharded_optimizer_tensor(
                entries[id(parameter)],
                torch.zeros(parameter.shape) if is_loading else _gathered(optimizer, parameter, shard, key),
                f"optimizer.{key}",
            )
            for key in _keys(parameter)
        }
    return state


@torch.no_grad()
def load_optimizer_state(
    optimizer: Any, models: Sequence[torch.nn.Module], state: dict[str, dict[str, Tensor]], num_updates: int
) -> None:
    """Load the optimizer from the tensors that :func:`sharded_optimizer_state` describes.

    Args:
        optimizer: Optimizer of megatron-core over the parameters of ``models``.
        models: Pipeline chunks, unwrapped.
        state: Loaded tensors.
        num_updates: Number of updates so far, for Adam's bias correction.
    """
    for name, parameter in _parameters(models):
        shard = _shard(optimizer, parameter)
        if shard is None:
            continue
        for key in _keys(parameter):
            part = state[name][key].view(-1)[shard.start : shard.stop]
            if key == _MAIN:
                shard.main.copy_(part.view_as(shard.main))
            else:
                shard.state[key] = part.view_as(shard.main).to(shard.main.device, copy=True)
        shard.state["step"] = torch.tensor(float(num_updates))


def _parameters(models: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for index, model in enumerate(models):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                yield f"{index}.{name}", parameter


def _keys(parameter: torch.nn.Parameter) -> tuple[str, ...]:
    return _MOMENTS if parameter.dtype == torch.float32 else (*_MOMENTS, _MAIN)


def _shard(optimizer: Any, parameter: torch.nn.Parameter) -> _Shard | None:
    """This rank's shard; None where the other data-parallel ranks hold all of the parameter's state."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    for part in chained:
        if not isinstance(part, DistributedOptimizer):
            main = getattr(parameter, "main_param", parameter)
            return _Shard(part.optimizer.state[main], main, 0, parameter.numel())
        place = part.model_param_group_index_map.get(parameter)
        if place is not None:
            group, index = place
            main = part.optimizer.param_groups[group]["params"][index]
            held = part._get_model_param_range_map(parameter)["param"]
            return _Shard(part.optimizer.state[main], main, held.start, held.end)
    return None


def _gathered(optimizer: Any, parameter: torch.nn.Parameter, shard: _Shard | None, key: str) -> Tensor:
    flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if shard is not None:
        part = shard.main if key == _MAIN else shard.state.get(key)
        if part is not None:
            flat[shard.start : shard.stop] = part.detach().view(-1)
    if any(isinstance(part, DistributedOptimizer) for part in getattr(optimizer, "chained_optimizers", [optimizer])):
        # exactly one rank has each element, the others have 0: the sum is exact
        dist.all_reduce(flat, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return flat.view(parameter.shape).cpu()
