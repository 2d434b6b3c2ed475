"""Writing of checkpoints: a copy of this rank's shard in host memory, then its file, on request in the background."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import CheckpointError
from mindspeed_simpo.model.pieces import pieces_of
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import fail_together, of_all_ranks
from mindspeed_simpo.training.checkpoint.folder import (
    FILES,
    STATE,
    FileList,
    FileRecord,
    TrainingState,
    expired,
    flush,
    folder_of,
    name_best,
    rank_file,
    record_of,
    remove,
)
from mindspeed_simpo.training.checkpoint.parts import NamesParameters, copied_parts
from mindspeed_simpo.training.checkpoint.shards import (
    MOMENTS,
    PARAMETER,
    name_of,
    named_slots,
    optimizer_shard,
    written_range,
)
from mindspeed_simpo.training.stepper import Stepper

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of a run; every method is a collective of the world.

    Args:
        root: Folder of the run's checkpoints.
        groups: Process groups of this rank.
        device: Its random state is written.
        keep: Number of newest checkpoints that remain, beside the best one; None keeps all.
        in_background: Whether :meth:`save` returns as soon as this rank's shard is copied to host memory.
    """

    def __init__(
        self, root: Path, groups: Groups, device: Device, keep: int | None = None, *, in_background: bool = False
    ) -> None:
        self.root, self.groups, self.device, self.keep = root, groups, device, keep
        self.in_background = in_background
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, state: TrainingState, models: Sequence[torch.nn.Module], stepper: Stepper) -> None:
        """Write the checkpoint ``root/iter_<step>`` and remove the oldest ones, after the checkpoint before it.

        Args:
            state: Content of ``state.json``.
            models: Pipeline chunks, wrapped or not.
            stepper: Optimizer and learning-rate schedule.

        Raises:
            CheckpointError: on every rank, where a rank cannot write this checkpoint, or could not write the one
                before it in the background; older checkpoints are not changed.
        """
        self.wait()
        tensors = copied_shard(models, stepper, self.groups)
        random_state, python_state = _random_state(self.device)
        tensors |= random_state
        if not self.in_background:
            self._write(state, tensors, python_state)
            return
        self._thread = threading.Thread(
            target=self._keeping_failure, args=(state, tensors, python_state), name=f"checkpoint {state.step}"
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            CheckpointError: on every rank, where a rank could not write its file.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _keeping_failure(self, state: TrainingState, tensors: dict[str, Tensor], python_state: str) -> None:
        try:
            self._write(state, tensors, python_state)
        except BaseException as error:  # raised by wait, in the main thread
            self._failure = error
            if self.groups.world.rank() == 0:
                logger.error("the checkpoint of step %d is not saved: %s", state.step, error)

    def _write(self, state: TrainingState, tensors: dict[str, Tensor], python_state: str) -> None:
        """Each rank writes its file and reports it; rank 0 completes the folder when it sees every reported file."""
        final, world = folder_of(self.root, state.step), self.groups.saving
        folder = self.root / f".{final.name}.incomplete"
        try:
            with fail_together(world), _written_errors(folder):
                if world.rank() == 0:
                    for left_over in self.root.glob(".iter_*"):
                        shutil.rmtree(left_over)
                    folder.mkdir(parents=True)
            with fail_together(world), _written_errors(folder):
                record = _write_shard(folder / rank_file(world.rank()), tensors, python_state)
            records = of_all_ranks(record, world)
            with fail_together(world), _written_errors(folder):
                if world.rank() == 0:
                    _complete(folder, final, state, records)
                    name_best(self.root, state.best)
                    for old in expired(self.root, self.keep, state.best):
                        remove(old)
        except CheckpointError:
            if world.rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)  # incomplete files would keep a full disk full
            raise
        if world.rank() == 0:
            logger.info("saved %s", final)


def copied_shard(models: Sequence[torch.nn.Module], stepper: Stepper, groups: Groups) -> dict[str, Tensor]:
    """What this rank writes: ``{name: piece}`` of the fp32 parameters and Adam's moments, copied to host memory.

    Args:
        models: Pipeline chunks, wrapped or not.
        stepper: The optimizer.
        groups: Process groups of the layout.
    """
    if isinstance(models[0], NamesParameters):
        return copied_parts(models[0], stepper.optimizer, groups.world.rank())
    found: dict[str, Tensor] = {}
    for slot, parameter in named_slots(models):
        shards = groups.shards(experts=slot.of_experts)
        if slot.replica or slot.is_copy(shards.rank):
            continue
        shard = optimizer_shard(stepper.optimizer, parameter)
        if shard is None:
            continue
        pieces = pieces_of(slot, shards.rank, shards.size, *written_range(shard, shards))
        for kind in (PARAMETER, *MOMENTS) if parameter.requires_grad else (PARAMETER,):
            held = shard.main if kind == PARAMETER else shard.state.get(kind)
            for piece in pieces:
                name = name_of(kind, piece.tensor.name, piece.offsets)
                if held is None:
                    found[name] = torch.zeros(piece.shape)
                else:
                    view = piece.view(held.detach().view(-1), shard.start)
                    found[name] = view.to("cpu", copy=True).contiguous()
    return found


def _random_state(device: Device) -> tuple[dict[str, Tensor], str]:
    """The generators' states as tensors, and that of Python's generator as JSON."""
    state = device.rng_state()
    python = state.pop("python")
    tensors: dict[str, Any] = {f"random|{name}": value for name, value in state.items()}
    trackers = tensor_parallel.get_cuda_rng_tracker().get_states()
    tensors |= {f"random|megatron|{name}": value for name, value in trackers.items()}
    return {name: value.cpu().clone() for name, value in tensors.items()}, json.dumps(python)


def _write_shard(path: Path, tensors: dict[str, Tensor], python_state: str) -> FileRecord:
    save_file(tensors, path, metadata={"python_random": python_state})
    flush(path)
    return record_of(path)


def _complete(folder: Path, final: Path, state: TrainingState, records: Sequence[FileRecord]) -> None:
    """Write the list of files, where this rank sees every file that a rank reported, and rename the folder."""
    for rank, record in enumerate(records):
        path = folder / rank_file(rank)
        if not path.is_file() or path.stat().st_size != record.bytes:
            raise CheckpointError(
                f"{path}: rank {rank} wrote this file of {record.bytes} bytes, and rank 0 does not see it: output_dir "
                "must be one folder that all hosts share"
            )
    (folder / STATE).write_text(state.model_dump_json(indent=1), encoding="utf-8")
    files = {rank_file(rank): record for rank, record in enumerate(records)}
    files[STATE] = record_of(folder / STATE)
    (folder / FILES).write_text(FileList(files=files).model_dump_json(indent=1), encoding="utf-8")
    for path in (folder / STATE, folder / FILES, folder):
        flush(path)
    if final.exists():
        remove(final)
    folder.rename(final)
    flush(final.parent)


@contextmanager
def _written_errors(folder: Path) -> Iterator[None]:
    """Raise errors of writing as :class:`CheckpointError`, with the free space where the disk is full."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = "No space left" in str(error)
        hint = f"; {shutil.disk_usage(folder.parent).free >> 20} MiB are free on its disk" if full else ""
        raise CheckpointError(f"{folder}: cannot be written: {error}{hint}") from error
