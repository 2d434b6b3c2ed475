"""Reading of checkpoints: each rank reads the pieces that its own layout needs, whatever layout wrote them."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import CheckpointError
from mindspeed_simpo.model.pieces import pieces_of
from mindspeed_simpo.model.slots import Slot
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import fail_together
from mindspeed_simpo.training.checkpoint.folder import rank_file, read_state
from mindspeed_simpo.training.checkpoint.parts import NamesParameters, load_parts
from mindspeed_simpo.training.checkpoint.shards import MOMENTS, PARAMETER, named_slots, optimizer_shard
from mindspeed_simpo.training.stepper import Stepper


def load(
    folder: Path, models: Sequence[torch.nn.Module], stepper: Stepper | None, groups: Groups, device: Device
) -> None:
    """Load models, optimizer and random state from a verified checkpoint of any layout; a collective of the world.

    Args:
        folder: Folder that :func:`~mindspeed_simpo.training.checkpoint.folder.find` returned.
        models: Pipeline chunks, wrapped or not.
        stepper: Optimizer and learning-rate schedule; None loads only the parameters.
        groups: Process groups of this rank.
        device: Its random state is restored where the checkpoint was written by the same number of ranks.

    Raises:
        CheckpointError: on every rank, where the checkpoint does not fit the model.
    """
    with fail_together(groups.control), _read_errors(folder):
        stored = StoredPieces(folder)
        step = read_state(folder).step
        own_names = isinstance(models[0], NamesParameters)
        if isinstance(models[0], NamesParameters):
            optimizer = stepper.optimizer if stepper is not None else None
            load_parts(stored.read, models[0], optimizer, step, groups.world.rank())
        else:
            _load_parameters(stored, models, groups)
        if stepper is not None:
            if not own_names:
                _load_optimizer(stored, models, stepper.optimizer, groups, step)
            stepper.resume_schedule_at(step)
            if stored.ranks == groups.world.size():
                _set_random_state(stored.file(groups.world.rank()), device)


@dataclass(frozen=True)
class _Stored:
    file: Any
    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class StoredPieces:
    """The pieces in the files of a checkpoint; opening reads only the headers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranks = len(list(folder.glob("rank_*.safetensors")))
        self._pieces: dict[tuple[str, str], list[_Stored]] = defaultdict(list)
        for rank in range(self.ranks):
            file = self.file(rank)
            names = file.keys()
            for name in names:
                kind, *rest = name.split("|")
                if kind == "random":
                    continue
                tensor, offsets = rest
                shape = tuple(file.get_slice(name).get_shape())
                place = tuple(map(int, offsets.split(",")))
                self._pieces[kind, tensor].append(_Stored(file, name, place, shape))

    def file(self, rank: int) -> Any:
        """The opened file of a rank of the run that wrote the checkpoint."""
        return safe_open(self.folder / rank_file(rank), framework="pt", device="cpu")

    def read(self, kind: str, tensor: str, at: Sequence[int], target: Tensor) -> None:
        """Copy a rectangle of a tensor into ``target``, which has its shape.

        Args:
            kind: ``parameter`` or one of the moments.
            tensor: Name of the tensor.
            at: First index of the rectangle along each axis.
            target: Takes the values.

        Raises:
            CheckpointError: where the files do not hold all values.
        """
        found = 0
        for stored in self._pieces[kind, tensor]:
            ranges = [
                (max(first, offset), min(first + length, offset + size))
                for first, length, offset, size in zip(at, target.shape, stored.offsets, stored.shape, strict=True)
            ]
            if any(low >= high for low, high in ranges):
                continue
            theirs, ours = (
                tuple(slice(low - start, high - start) for (low, high), start in zip(ranges, starts, strict=True))
                for starts in (stored.offsets, at)
            )
            target[ours].copy_(stored.file.get_slice(stored.name)[theirs])
            found += math.prod(high - low for low, high in ranges)
        if found != target.numel():
            raise CheckpointError(
                f"{self.folder}: {kind} of {tensor}: {found} values stored of {target.numel()} "
                "that the model needs; is it a checkpoint of this model?"
            )

    def fill(self, kind: str, slot: Slot, groups: Groups, flat: Tensor, start: int) -> None:
        """Read elements of a slot's flat parameter, from ``start`` on, into ``flat``; padding is not changed."""
        shards = groups.shards(experts=slot.of_experts)
        for piece in pieces_of(slot, shards.rank, shards.size, start, start + flat.numel()):
            self.read(kind, piece.tensor.name, piece.offsets, piece.view(flat, start))


@torch.no_grad()
def _load_parameters(stored: StoredPieces, models: Sequence[torch.nn.Module], groups: Groups) -> None:
    for slot, parameter in named_slots(models):
        parameter.zero_()  # padding
        stored.fill(PARAMETER, slot, groups, parameter.data.view(-1), 0)


@torch.no_grad()
def _load_optimizer(
    stored: StoredPieces, models: Sequence[torch.nn.Module], optimizer: Any, groups: Groups, num_updates: int
) -> None:
    for slot, parameter in named_slots(models):
        shard = optimizer_shard(optimizer, parameter) if parameter.requires_grad else None
        if shard is None:
            continue
        if shard.main.dtype != parameter.dtype:
            stored.fill(PARAMETER, slot, groups, shard.main.view(-1), shard.start)
        for kind in MOMENTS:
            moment = torch.zeros_like(shard.main)
            stored.fill(kind, slot, groups, moment.view(-1), shard.start)
            shard.state[kind] = moment
        shard.state["step"] = torch.tensor(float(num_updates))
    # torch's Adam counts the updates in the state of each parameter; the Adam of MindSpeed, apex and TransformerEngine
    # counts them in the parameter group
    for group in optimizer.param_groups:
        group["step"] = torch.tensor(num_updates)


def _set_random_state(file: Any, device: Device) -> None:
    names = file.keys()
    state = {name.removeprefix("random|"): file.get_tensor(name) for name in names if name.startswith("random|")}
    trackers = {name.removeprefix("megatron|"): state.pop(name) for name in list(state) if name.startswith("megatron|")}
    tensor_parallel.get_cuda_rng_tracker().set_states(trackers)
    version, words, gauss = json.loads(file.metadata()["python_random"])
    device.set_rng_state({**state, "python": (version, tuple(words), gauss)})


@contextmanager
def _read_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: {type(error).__name__}: {error}; is it a checkpoint of this model?"
        ) from error
