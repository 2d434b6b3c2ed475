"""What each rank holds of a model that FSDP2 shards, for checkpoints: rectangles of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mindspeed_simpo.training.checkpoint.shards import MOMENTS, PARAMETER, name_of


@runtime_checkable
class NamesParameters(Protocol):
    """A model whose parameters a checkpoint stores by names of its own: that of ``backend: fsdp``."""

    def stored_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The parameters that a checkpoint holds, with their names."""


@dataclass(frozen=True)
class HeldPart:
    """This rank's part of a parameter."""

    name: str
    """Name in a model of transformers, or of peft for a factor of an adapter."""
    parameter: torch.nn.Parameter
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    writes: bool
    """Whether this rank is the first of those that hold the part."""

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor that is sharded as the parameter is."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_parts(model: NamesParameters, rank: int) -> Iterator[HeldPart]:
    """This rank's parts of the stored parameters: of all of them, or of the adapters where there are any.

    Args:
        model: The model.
        rank: Rank of the world.
    """
    for name, parameter in model.stored_parameters():
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            shape, offsets = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
            coordinate = mesh.get_coordinate()
            assert coordinate is not None
            copies = [at for at, placement in zip(coordinate, placements, strict=True) if placement.is_replicate()]
            yield HeldPart(name, parameter, tuple(offsets), tuple(shape), writes=not any(copies))
        else:
            offsets = (0,) * parameter.dim()
            yield HeldPart(name, parameter, offsets, tuple(parameter.shape), writes=rank == 0)


def copied_parts(model: NamesParameters, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, Tensor]:
    """What a rank writes: ``{name: part}`` of the parameters and Adam's moments, copied to host memory.

    Args:
        model: The model.
        optimizer: Its optimizer.
        rank: Rank of the world.
    """
    found = {}
    for part in held_parts(model, rank):
        state = optimizer.state.get(part.parameter, {})
        if not part.writes or 0 in part.shape:
            continue
        found[name_of(PARAMETER, part.name, part.offsets)] = _copy(part.local(part.parameter))
        for kind in MOMENTS if part.parameter.requires_grad else ():
            values = part.local(state[kind]) if kind in state else torch.zeros(part.shape)
            found[name_of(kind, part.name, part.offsets)] = _copy(values)
    return found


def _copy(values: Tensor) -> Tensor:
    return values.detach().to("cpu", copy=True).contiguous()


Read = Callable[[str, str, tuple[int, ...], Tensor], None]
"""``read(kind, tensor, offsets, target)``."""


@torch.no_grad()
def load_parts(
    read: Read, model: NamesParameters, optimizer: torch.optim.Optimizer | None, num_updates: int, rank: int
) -> None:
    """Load this rank's parts, and with an optimizer its state.

    Args:
        read: Copies stored values into a tensor.
        model: The model.
        optimizer: Its optimizer; None loads only the parameters.
        num_updates: Number of the checkpoint's updates.
        rank: Rank of the world.
    """
    for part in held_parts(model, rank):
        read(PARAMETER, part.name, part.offsets, part.local(part.parameter).data)
        if optimizer is None or not part.parameter.requires_grad:
            continue
        state: dict[str, Any] = {"step": torch.tensor(float(num_updates))}
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(part.parameter)
            read(kind, part.name, part.offsets, part.local(state[kind]))
        optimizer.state[part.parameter] = state
