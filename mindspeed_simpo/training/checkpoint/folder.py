"""Folders of checkpoints: their names, their list of files, and the verification of the files before they are read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.distributed as dist
from pydantic import BaseModel

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.errors import CheckpointError
from mindspeed_simpo.loss.running import RunningState
from mindspeed_simpo.parallel.collectives import fail_together, of_all_ranks, of_first_rank
from mindspeed_simpo.training.base_model import Base
from mindspeed_simpo.training.best import Best
from mindspeed_simpo.training.run_facts import RunFacts

STATE = "state.json"
FILES = "files.json"
BEST = "best.json"
_NAME = re.compile(r"iter_(\d{7,})")


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
    base: Base | None = None
    """The model that the adapters belong to; None where the checkpoint holds all weights."""
    best: Best | None = None
    """The best evaluation so far; None where no metric is configured."""
    evaluation_due: bool = False
    """Whether a signal stopped the run before the evaluation of this step."""
    facts: RunFacts | None = None
    """What the card of the model says beside the configuration; None in checkpoints of earlier versions."""
    config: Config


def folder_of(root: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return root / f"iter_{step:07d}"


def rank_file(rank: int) -> str:
    """Name of the file that a rank of the world writes."""
    return f"rank_{rank:05d}.safetensors"


def list_checkpoints(root: Path) -> list[Path]:
    """The completely written checkpoints in a folder, oldest first; empty where the folder does not exist."""
    found = [path for path in root.glob("iter_*") if _NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=_step)


def remove(folder: Path) -> None:
    """Delete a checkpoint; if the run is killed meanwhile, no incomplete folder has the name of a checkpoint."""
    hidden = folder.with_name(f".{folder.name}.removed")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def expired(root: Path, keep: int | None, best: Best | None) -> list[Path]:
    """The checkpoints that are not kept: all but the ``keep`` newest and the best.

    Args:
        root: Folder of checkpoints.
        keep: None keeps all.
        best: The best evaluation so far; None where no metric is configured.
    """
    old = list_checkpoints(root)[:-keep] if keep else []
    return [path for path in old if best is None or _step(path) != best.step]


def name_best(root: Path, best: Best | None) -> None:
    """Have ``best.json`` name the best checkpoint of a folder, or remove it where there is none."""
    path = root / BEST
    if best is None or best.step is None:
        path.unlink(missing_ok=True)
        return
    named = {"checkpoint": folder_of(root, best.step).name, **best.model_dump(exclude={"without_improvement"})}
    unfinished = path.with_name(f".{BEST}.incomplete")
    unfinished.write_text(json.dumps(named, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def find(load: str, world: dist.ProcessGroup | None) -> tuple[Path, TrainingState]:
    """Find the checkpoint that the key ``load`` names, and verify the size and digest of every file; a collective.

    Each rank reads its share of the files.

    Args:
        load: An ``iter_*`` folder; or a folder of such folders or the output folder of a run, for the newest one.
        world: The ranks that share the work, a gloo group; None in a process of its own.

    Returns:
        Folder and state of the checkpoint.

    Raises:
        CheckpointError: on every rank, where there is no checkpoint, or it is incomplete or damaged; the message names
            the defect and the newest valid checkpoint before it.
    """
    chosen = choose(load, world)
    problem = _find_problem(chosen, world)
    if problem is None:
        return chosen, read_state(chosen)
    earlier = _newest_whole(_before(chosen), world)
    advice = f"the newest whole one before it is {earlier}" if earlier else "there is no whole one before it"
    raised = CheckpointError(f"load: {chosen} cannot be used: {problem}; {advice}")
    raised.everywhere = True
    raise raised


def choose(load: str, world: dist.ProcessGroup | None) -> Path:
    """The checkpoint that :func:`find` finds, not verified; a collective.

    Raises:
        CheckpointError: on every rank, where there is no checkpoint.
    """
    with fail_together(world):
        chosen = _chosen(load)
    return of_first_rank(chosen, world)


def find_newest(root: Path, world: dist.ProcessGroup | None) -> tuple[Path, TrainingState] | None:
    """The newest checkpoint of a folder that is complete and not damaged; None where there is none; a collective.

    Args:
        root: Folder of checkpoints.
        world: See :func:`find`.
    """
    newest = _newest_whole(list_checkpoints(root), world)
    return None if newest is None else (newest, read_state(newest))


def read_state(folder: Path) -> TrainingState:
    """Read ``state.json`` of a checkpoint.

    Raises:
        ValueError: where the content does not fit :class:`TrainingState`.
    """
    return TrainingState.model_validate_json((folder / STATE).read_text(encoding="utf-8"))


def record_of(path: Path) -> FileRecord:
    """Size and digest of a file, from its content."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return FileRecord(bytes=path.stat().st_size, blake2b=digest.hexdigest())


def flush(path: Path) -> None:
    """Write a file or folder through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _step(folder: Path) -> int:
    name = _NAME.search(folder.name)
    return int(name[1]) if name else -1


def _chosen(load: str) -> Path:
    given = Path(load)
    if not given.is_dir():
        raise CheckpointError(f"load: {given} is not a folder; give a checkpoints folder or one of its iter_* folders")
    if (given / FILES).is_file() or _NAME.fullmatch(given.name) or given.name.startswith(".iter_"):
        return given
    root = given / "checkpoints" if (given / "checkpoints").is_dir() else given
    candidates = list_checkpoints(root)
    if not candidates:
        raise CheckpointError(f"load: no checkpoint (iter_*) in {root}; remove `load` to start anew")
    return candidates[-1]


def _before(chosen: Path) -> list[Path]:
    return [path for path in list_checkpoints(chosen.parent) if _step(path) < _step(chosen)]


def _newest_whole(folders: Sequence[Path], world: dist.ProcessGroup | None) -> Path | None:
    newest_first = of_first_rank(list(reversed(folders)), world)
    return next((path for path in newest_first if _find_problem(path, world) is None), None)


def _find_problem(folder: Path, world: dist.ProcessGroup | None) -> str | None:
    """The first problem that a rank finds, the same on every rank."""
    rank, size = (0, 1) if world is None else (world.rank(), world.size())
    found = of_all_ranks(next(_problems(folder, rank, size), None), world)
    return next((problem for problem in found if problem is not None), None)


def _problems(folder: Path, rank: int, size: int) -> Iterator[str]:
    """The problems of a checkpoint; the content of every ``size``-th file is read, from file ``rank`` on."""
    if not (folder / FILES).is_file():
        yield f"half-written: it has no {FILES}, which is written last"
        return
    try:
        files = FileList.model_validate_json((folder / FILES).read_bytes()).files
    except (OSError, ValueError) as error:
        yield f"{FILES} is damaged ({str(error).splitlines()[0]})"
        return
    if not {STATE, rank_file(0)} <= files.keys() or any(Path(name).name != name for name in files):
        yield f"{FILES} is damaged: it does not list every file"
        return
    for index, (name, expected) in enumerate(files.items()):
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != expected.bytes:
            yield f"{name} is damaged: {path.stat().st_size} bytes, expected {expected.bytes}"
        elif index % size == rank and record_of(path) != expected:
            yield f"{name} is damaged: its content does not match the digest in {FILES}"
    try:
        read_state(folder)
    except ValueError as error:
        yield f"{STATE} is of another version of this program ({' '.join(str(error).split())})"
