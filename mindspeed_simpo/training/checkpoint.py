"""Training checkpoints: written atomically, verified before they are read.

A checkpoint is a folder ``iter_0000100`` with megatron-core's distributed checkpoint of parameters and optimizer state,
the random state of each rank, ``state.json`` (step, data position, resolved configuration) and, written last,
``files.json`` (size and digest of every other file). The folder is written under a temporary name and renamed when it
is complete, so a killed run leaves no incomplete folder under the name of a checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from pydantic import BaseModel
from torch.distributed.checkpoint.api import CheckpointException

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import CheckpointError
from mindspeed_simpo.loss.running import RunningState
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import fail_together
from mindspeed_simpo.parallel.lost_ranks import is_peer_failure
from mindspeed_simpo.training.optimizer import Stepper
from mindspeed_simpo.training.optimizer_state import load_optimizer_state, sharded_optimizer_state

_NAME = re.compile(r"iter_(\d{7,})")
_STATE = "state.json"
_FILES = "files.json"


class FileRecord(BaseModel):
    """Size and digest of one file of a checkpoint."""

    bytes: int
    blake2b: str
    """Hexadecimal BLAKE2b digest of 16 bytes."""


class FileList(BaseModel):
    """Content of ``files.json``: every other file of the checkpoint, by name."""

    files: dict[str, FileRecord]


class TrainingState(BaseModel):
    """Content of ``state.json``: the state of a run apart from parameters, optimizer and random state."""

    step: int
    consumed_pairs: int
    data_fingerprint: str
    running: RunningState | None = None
    """Statistics of the objective's tracked value."""
    config: Config


def save(
    root: Path,
    state: TrainingState,
    models: Sequence[torch.nn.Module],
    stepper: Stepper,
    groups: Groups,
    device: Device,
    keep: int | None,
) -> Path:
    """Write the checkpoint ``root/iter_<step>`` and remove the oldest ones; a collective of the world.

    Args:
        root: Folder of the run's checkpoints.
        state: Content of ``state.json``.
        models: Pipeline chunks, wrapped or not.
        stepper: Optimizer and learning-rate schedule.
        groups: Process groups of this rank.
        device: Its random state is written.
        keep: Number of newest checkpoints that remain; None keeps all.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: on every rank, where a rank cannot write; older checkpoints are not changed.
    """
    final = root / f"iter_{state.step:07d}"
    temporary = root / f".{final.name}.incomplete"
    rank = groups.world.rank()
    with fail_together(groups.world), _checkpoint_errors(temporary):
        if rank == 0:
            for left_over in root.glob(".iter_*"):
                shutil.rmtree(left_over)
            temporary.mkdir(parents=True)
    # no fail_together: the call has collectives inside; where one rank raises before such a collective, the other
    # ranks do not reach the collective of fail_together
    with _checkpoint_errors(temporary), _quiet_megatron():
        dist_checkpointing.save(_sharded_state(models, stepper), str(temporary))
    with fail_together(groups.world), _checkpoint_errors(temporary):
        torch.save(_rng_state(device), temporary / f"rng_{rank}.pt")
    with fail_together(groups.world), _checkpoint_errors(temporary):
        if rank == 0:
            _finalise(temporary, final, state)
            for old in list_checkpoints(root)[: -keep or None] if keep else []:
                _remove(old)
    return final


def _finalise(temporary: Path, final: Path, state: TrainingState) -> None:
    (temporary / _STATE).write_text(state.model_dump_json(indent=1), encoding="utf-8")
    files = FileList(files={path.name: _record(path) for path in sorted(temporary.iterdir())})
    (temporary / _FILES).write_text(files.model_dump_json(indent=1), encoding="utf-8")
    for path in temporary.iterdir():
        _flush(path)
    _flush(temporary)
    if final.exists():
        _remove(final)
    temporary.rename(final)
    _flush(final.parent)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; if the run is killed meanwhile, no incomplete folder has the name of a checkpoint."""
    hidden = folder.with_name(f".{folder.name}.removed")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def list_checkpoints(root: Path) -> list[Path]:
    """The completely written checkpoints in a folder, oldest first; empty where the folder does not exist."""
    found = [path for path in root.glob("iter_*") if _NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    name = _NAME.search(folder.name)
    return int(name[1]) if name else -1


def find(load: str) -> tuple[Path, TrainingState]:
    """Find the checkpoint that the key ``load`` names, and verify the size and digest of every file.

    Args:
        load: An ``iter_*`` folder; or a folder of such folders or the output folder of a run, for the newest one.

    Returns:
        Folder and state of the checkpoint.

    Raises:
        CheckpointError: where there is no checkpoint, or it is incomplete or damaged; the message names the defect and
            the newest valid checkpoint before it.
    """
    given = Path(load)
    if not given.is_dir():
        raise CheckpointError(f"load: {given} is not a folder; give a checkpoints folder or one of its iter_* folders")
    if (given / _FILES).is_file() or _NAME.fullmatch(given.name) or given.name.startswith(".iter_"):
        chosen = given
    else:
        root = given / "checkpoints" if (given / "checkpoints").is_dir() else given
        candidates = list_checkpoints(root)
        if not candidates:
            raise CheckpointError(f"load: no checkpoint (iter_*) in {root}; remove `load` to start anew")
        chosen = candidates[-1]
    problem = _find_problem(chosen)
    if problem is None:
        return chosen, read_state(chosen)
    before = [path for path in list_checkpoints(chosen.parent) if _step(path) < _step(chosen)]
    earlier = [path for path in before if _find_problem(path) is None]
    advice = f"the newest whole one before it is {earlier[-1]}" if earlier else "there is no whole one before it"
    raise CheckpointError(f"load: {chosen} cannot be used: {problem}; {advice}")


def read_state(folder: Path) -> TrainingState:
    """Read ``state.json`` of a checkpoint.

    Raises:
        ValueError: where the content does not fit :class:`TrainingState`.
    """
    return TrainingState.model_validate_json((folder / _STATE).read_text(encoding="utf-8"))


def load(
    folder: Path, models: Sequence[torch.nn.Module], stepper: Stepper | None, groups: Groups, device: Device
) -> None:
    """Load models, optimizer and random state from a verified checkpoint of any layout; a collective of the world.

    Args:
        folder: Folder that :func:`find` returned.
        models: Pipeline chunks, wrapped or not.
        stepper: Optimizer and learning-rate schedule; None loads only the parameters.
        groups: Process groups of this rank.
        device: Its random state is restored where the checkpoint was written by the same number of ranks.

    Raises:
        CheckpointError: where the checkpoint does not fit the model.
    """
    hint = "; is it a checkpoint of this model?"
    with _checkpoint_errors(folder, hint), _quiet_megatron():  # no fail_together: see save
        loaded = dist_checkpointing.load(_sharded_state(models, stepper, is_loading=True), str(folder))
    with fail_together(groups.world), _checkpoint_errors(folder, hint):
        for key, model in _chunks(models):
            model.load_parameters(loaded[key])
        if stepper is not None:
            step = read_state(folder).step
            load_optimizer_state(stepper.optimizer, [model for _, model in _chunks(models)], loaded["optimizer"], step)
            stepper.resume_schedule_at(step)
            rng = folder / f"rng_{groups.world.rank()}.pt"
            if rng.is_file() and len(list(folder.glob("rng_*.pt"))) == groups.world.size():
                _set_rng_state(torch.load(rng, weights_only=True), device)


def _sharded_state(
    models: Sequence[torch.nn.Module], stepper: Stepper | None, *, is_loading: bool = False
) -> dict[str, Any]:
    chunks = _chunks(models)
    state: dict[str, Any] = {key: model.sharded_state_dict() for key, model in chunks}
    if stepper is not None:
        unwrapped = [model for _, model in chunks]
        state["optimizer"] = sharded_optimizer_state(stepper.optimizer, unwrapped, dict(state), is_loading=is_loading)
    return state


def _chunks(models: Sequence[torch.nn.Module]) -> list[tuple[str, Any]]:
    keys = ["model"] if len(models) == 1 else [f"model{index}" for index in range(len(models))]
    return [(key, _unwrap(model)) for key, model in zip(keys, models, strict=True)]


def _unwrap(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model


def _rng_state(device: Device) -> dict[str, Any]:
    return device.rng_state() | {"megatron": tensor_parallel.get_cuda_rng_tracker().get_states()}


def _set_rng_state(state: dict[str, Any], device: Device) -> None:
    tensor_parallel.get_cuda_rng_tracker().set_states(state["megatron"])
    device.set_rng_state(state)


@contextmanager
def _checkpoint_errors(folder: Path, hint: str = "") -> Iterator[None]:
    """Raise the errors of reading and writing as :class:`CheckpointError`; errors of lost peers are not changed."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, CheckpointingException) as error:
        if is_peer_failure(error):
            raise
        raise CheckpointError(f"{folder}: {type(error).__name__}: {error}{hint}") from error
    except CheckpointException as error:  # a BaseException of torch that collects the exceptions of all ranks
        cause = next((failure[0] for failure in error.failures.values()), error)
        if is_peer_failure(cause):
            raise cause from error
        raise CheckpointError(f"{folder}: {type(cause).__name__}: {cause}{hint}") from error


@contextmanager
def _quiet_megatron() -> Iterator[None]:
    # megatron-core's checkpoints use functions that torch deprecates or marks as unstable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def _record(path: Path) -> FileRecord:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return FileRecord(bytes=path.stat().st_size, blake2b=digest.hexdigest())


def _find_problem(folder: Path) -> str | None:
    if not (folder / _FILES).is_file():
        return f"half-written: it has no {_FILES}, which is written last"
    try:
        files = FileList.model_validate_json((folder / _FILES).read_bytes()).files
        listed = {_STATE, ".metadata"} <= files.keys()
    except (OSError, ValueError) as error:
        return f"{_FILES} is damaged ({str(error).splitlines()[0]})"
    if not listed:
        return f"{_FILES} is damaged: it does not list every file"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected.bytes:
            return f"{name} is damaged: {path.stat().st_size} bytes, expected {expected.bytes}"
        if _record(path) != expected:
            return f"{name} is damaged: its content does not match the digest in {_FILES}"
    try:
        read_state(folder)
    except ValueError as error:
        return f"{_STATE} is of another version of this program ({' '.join(str(error).split())})"
    return None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
