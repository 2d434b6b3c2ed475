"""Adam's state by parameter, in the parameter's shape, whatever optimizer holds it and however it is divided.

A checkpoint in this form can be read at any other layout, with the distributed optimizer or without it, and by either
line of megatron-core.
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
class _Piece:
    """What this rank's optimizer holds of a parameter: elements ``start`` to ``stop`` of it, flattened."""

    state: dict[str, Any]
    """torch Adam's; empty before the first update."""
    main: Tensor
    """fp32; the parameter itself, or a view of it, where that is fp32."""
    start: int
    stop: int


def sharded_optimizer_state(
    optimizer: Any, models: Sequence[torch.nn.Module], model_state: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    """The state for ``dist_checkpointing``, ``{parameter: {moment: whole tensor}}`` in host memory; a collective.

    Args:
        optimizer: megatron-core's.
        models: Pipeline chunks, unwrapped.
        model_state: The chunks' ``sharded_state_dict``; says how each parameter is divided.
        is_loading: Leave the tensors unfilled.
    """
    entries = {
        id(entry.data): entry
        for entry in nested_values(model_state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    state: dict[str, Any] = {}
    for name, parameter in _parameters(models):
        piece = _piece(optimizer, parameter)
        state[name] = {
            key: make_sharded_optimizer_tensor(
                entries[id(parameter)],
                torch.zeros(parameter.shape) if is_loading else _whole(optimizer, parameter, piece, key),
                f"optimizer.{key}",
            )
            for key in _keys(parameter)
        }
    return state


@torch.no_grad()
def load_optimizer_state(
    optimizer: Any, models: Sequence[torch.nn.Module], state: dict[str, dict[str, Tensor]], num_updates: int
) -> None:
    """Fill the optimizer from the whole tensors that :func:`sharded_optimizer_state` describes.

    Args:
        optimizer: megatron-core's, of the parameters of ``models``.
        models: Pipeline chunks, unwrapped.
        state: Loaded tensors.
        num_updates: Updates that the moments have seen; Adam's bias correction needs it.
    """
    for name, parameter in _parameters(models):
        piece = _piece(optimizer, parameter)
        if piece is None:
            continue
        for key in _keys(parameter):
            part = state[name][key].view(-1)[piece.start : piece.stop]
            if key == _MAIN:
                piece.main.copy_(part.view_as(piece.main))
            else:
                piece.state[key] = part.view_as(piece.main).to(piece.main.device, copy=True)
        piece.state["step"] = torch.tensor(float(num_updates))


def _parameters(models: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for index, model in enumerate(models):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                yield f"{index}.{name}", parameter


def _keys(parameter: torch.nn.Parameter) -> tuple[str, ...]:
    return _MOMENTS if parameter.dtype == torch.float32 else (*_MOMENTS, _MAIN)


def _piece(optimizer: Any, parameter: torch.nn.Parameter) -> _Piece | None:
    """None where other data-parallel ranks hold all of the parameter's state."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    for part in chained:
        if not isinstance(part, DistributedOptimizer):
            main = getattr(parameter, "main_param", parameter)
            return _Piece(part.optimizer.state[main], main, 0, parameter.numel())
        place = part.model_param_group_index_map.get(parameter)
        if place is not None:
            group, index = place
            main = part.optimizer.param_groups[group]["params"][index]
            held = part._get_model_param_range_map(parameter)["param"]
            return _Piece(part.optimizer.state[main], main, held.start, held.end)
    return None


def _whole(optimizer: Any, parameter: torch.nn.Parameter, piece: _Piece | None, key: str) -> Tensor:
    flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if piece is not None:
        part = piece.main if key == _MAIN else piece.state.get(key)
        if part is not None:
            flat[piece.start : piece.stop] = part.detach().view(-1)
    if any(isinstance(part, DistributedOptimizer) for part in getattr(optimizer, "chained_optimizers", [optimizer])):
        # every element is held by one rank: the sum puts the pieces together, bit by bit
        dist.all_reduce(flat, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return flat.view(parameter.shape).cpu()
