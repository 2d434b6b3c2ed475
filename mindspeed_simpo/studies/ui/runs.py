"""The runs below the root folder: found, started, stopped and resumed; what is known of one lies in its own folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mindspeed_simpo.config.file import read_configuration, validate
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.studies.ui import form, locks
from mindspeed_simpo.studies.ui.root import Root
from mindspeed_simpo.studies.whole_file import write_whole

OWN = "ui"
"""Folder of the page in a run's folder: ``config.yaml``, ``log.txt``, ``run.json`` and ``lock``."""
State = Literal["running", "stopping", "finished", "stopped", "failed", "elsewhere", "ended"]
_MARKS = ("metrics.jsonl", f"{OWN}/run.json", f"{OWN}/config.yaml")
_NOT_SEARCHED = {"checkpoints", "tensorboard", "hf", OWN, "node_modules", "__pycache__", "analysis"}
_MOST_FOLDERS = 5000
_TAIL_BYTES = 64 * 1024
_CLOCK_S = 10.0
"""By which the clocks of a host and of its file server may differ."""
_STEP = re.compile(r"(?:train|eval) step (\d+)/(\d+)")
_SIGNALLED = {128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)}


@dataclass(frozen=True)
class Run:
    """What is known of a run."""

    name: str
    """Its folder, relative to the root folder."""
    state: State
    """running and stopping: started by a page and alive. elsewhere: alive, started by something else. finished,
    stopped (saved, can be resumed), failed: over. ended: over, started by something else, without a last word."""
    ranks: int
    """0 where nothing says how many."""
    exit_code: int | None
    step: int
    steps: int
    """Of the whole run; 0 as long as it has not said so."""
    seconds: float | None
    """Since its start, or from its start to its end."""
    log: str
    """The last lines of what it said."""
    summary: Mapping[str, Any]
    """Its ``summary.json``; empty where there is none."""

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.state in ("running", "stopping", "elsewhere")

    @property
    def errors(self) -> list[str]:
        """The last lines of a failure: its messages, or what stands at the end of its log."""
        if self.state != "failed":
            return []
        lines = self.log.splitlines()
        return [line for line in lines if line.startswith("error: ")][-5:] or lines[-5:]


def find_runs(root: Root) -> list[str]:
    """Names of all runs below the root folder, the newest first; links are not followed."""
    found: list[tuple[float, str]] = []
    for number, (folder, folders, _) in enumerate(os.walk(root.folder)):
        if number >= _MOST_FOLDERS:
            break
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in _NOT_SEARCHED)
        times = [(Path(folder) / mark).stat().st_mtime for mark in _MARKS if (Path(folder) / mark).is_file()]
        if times:
            found.append((max(times), root.name(Path(folder))))
    return [name for _, name in sorted(found, reverse=True)]


def folder_of(root: Root, name: str) -> Path:
    """The folder of a run.

    Raises:
        ConfigError: where it lies outside of the root folder, or holds no run.
    """
    folder = root.inside(name, "run")
    if not any((folder / mark).is_file() for mark in _MARKS):
        raise ConfigError(f"run: {name} holds no run")
    return folder


def start(root: Root, values: Mapping[str, Any], nproc: int) -> str:
    """Start training in a session of its own, which the page's end does not touch.

    Args:
        root: The root folder, where the run is at home: relative paths are relative to it.
        values: Keys of the configuration.
        nproc: Ranks.

    Returns:
        The run's name.

    Raises:
        ConfigError: where the configuration is wrong, leaves the root folder, or names the folder of a live run.
    """
    root.check(values)
    config = form.validated(values, nproc)
    output = root.inside(config.output_dir, "output_dir")
    written = form.to_yaml(form.changed(config))
    if config.load is None and (output / "metrics.jsonl").is_file():
        raise ConfigError(
            f"output_dir: {root.name(output)} holds a run already: give another folder, or go on with that run "
            "(Resume, or load: auto)"
        )
    return _launch(root, output, written, nproc)


def resume(root: Root, name: str) -> str:
    """Go on with a run from its newest checkpoint, with its own configuration and number of ranks.

    Returns:
        The run's name.

    Raises:
        ConfigError: see :func:`start`.
    """
    folder = folder_of(root, name)
    values = values_of(root, name)
    nproc = _record(folder).get("ranks") or _ranks_needed(values)
    return start(root, values | {"load": "auto", "output_dir": root.name(folder)}, nproc)


def values_of(root: Root, name: str) -> dict[str, Any]:
    """The keys of a run's configuration that differ from their default.

    Raises:
        ConfigError: where there are none, or they cannot be read.
    """
    folder = folder_of(root, name)
    places = (f"{OWN}/config.yaml", "config.yaml") if _record(folder) else ("config.yaml", f"{OWN}/config.yaml")
    file = next((folder / part for part in places if (folder / part).is_file()), None)
    if file is None:
        raise ConfigError(f"run: {name} has no config.yaml")
    values = {key: value for key, value in read_configuration(file).items() if value is not None}
    return form.changed(validate(values, where=root.name(file)))


def stop(root: Root, name: str, *, kill: bool = False) -> None:
    """Ask a run to save and end (SIGTERM), or kill it where it was asked before.

    Raises:
        ConfigError: where the page has not started this run, or it is over.
    """
    folder = folder_of(root, name)
    run = describe(root, name)
    record = _record(folder)
    if not run.alive:
        raise ConfigError(f"run: {name} is over")
    if run.state == "elsewhere" or record.get("host", socket.gethostname()) != socket.gethostname():
        raise ConfigError(f"run: {name} was not started by the page on this host: stop it where it was started")
    if kill != (run.state == "stopping"):
        raise ConfigError(f"run: {name} is {run.state}" + (": ask it to stop first" if kill else " already"))
    os.kill(int(record["process"]), signal.SIGTERM)


def describe(root: Root, name: str) -> Run:
    """What is known of a run now.

    Raises:
        ConfigError: see :func:`folder_of`.
    """
    folder = folder_of(root, name)
    record = _record(folder)
    own, log = tail(root, folder / OWN / "log.txt"), tail(root, folder / "run.log")
    steps = _STEP.findall(log) or _STEP.findall(own)
    step, total = map(int, steps[-1]) if steps else (0, 0)
    code = record.get("exit_code")
    state = _state(folder, record, step, total, log)
    seconds = None
    if record and state != "elsewhere":
        seconds = (record.get("ended") or time.time()) - record["started"]
        log = own
    log = "\n".join(log.splitlines()[-200:])
    summary = {} if state in ("running", "stopping", "elsewhere") else _object(root, folder / "summary.json")
    ranks = record.get("ranks") or (summary.get("trained") or {}).get("ranks") or 0
    return Run(name, state, int(ranks), code, step, total, seconds, log, summary)


def tail(root: Root, path: Path) -> str:
    """The last whole lines of a file in the root folder; an empty text where there is none."""
    try:
        with root.inside(str(path), path.name).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return text.partition("\n")[2] if size > _TAIL_BYTES else text


def _launch(root: Root, output: Path, written: str, nproc: int) -> str:
    folder = output / OWN
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
    except OSError as error:
        raise ConfigError(f"output_dir: cannot make {folder}: {error}") from None
    with lock:
        if not locks.acquire(lock) or locks.held_by_trainer(output):
            raise ConfigError(f"output_dir: a run is alive in {root.name(output)}: wait for its end, or stop it")
        record = folder / "run.json"
        record.unlink(missing_ok=True)
        config = folder / "config.yaml"
        write_whole(config, f"# Written by `mindspeed-simpo ui`.\n{written}")
        words = ["train", root.name(config), "--nproc-per-node", str(nproc)]
        module = f"{__package__}.supervisor"
        with (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(record), str(lock.fileno()), str(nproc), *words],
                cwd=root.folder,
                start_new_session=True,
                pass_fds=(lock.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
            )
    threading.Thread(target=process.wait, daemon=True).start()
    while not record.exists() and process.poll() is None:
        time.sleep(0.02)
    return root.name(output)


def environment() -> dict[str, str]:
    """Environment of the programs that the page starts in the root folder, whose files are none of their modules."""
    package = Path(__file__).parents[3]
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if package != Path(sysconfig.get_path("purelib")):
        paths.insert(0, str(package))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1", "COLUMNS": "76"}


def _state(folder: Path, record: dict[str, Any], step: int, total: int, log: str) -> State:
    if locks.is_held(folder / OWN / "lock"):
        return "stopping" if record.get("stop_requests") else "running"
    if locks.held_by_trainer(folder):
        return "elsewhere"
    if record:
        code = record["exit_code"]
        if code == 0:
            return "finished"
        return "stopped" if code in _SIGNALLED or record["stop_requests"] > 1 else "failed"
    if total and step == total:
        return "finished"
    return "stopped" if "stopped by SIG" in log[-2000:] else "ended"


def _record(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / OWN / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or "started" not in found:
        return {}
    with contextlib.suppress(OSError):
        last = (folder / "metrics.jsonl").stat().st_mtime
        if found["ended"] is not None and last > found["ended"] + _CLOCK_S:  # started again from a terminal
            return {}
    return found


def _object(root: Root, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(root.inside(str(path), path.name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _ranks_needed(values: Mapping[str, Any]) -> int:
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    product = 1
    for name in names:
        product *= int(values.get(name, 1))
    return product


def configurations(root: Root) -> Iterator[str]:
    """YAML files of the root folder and of its folder ``configs``, as relative paths."""
    for pattern in ("*.yaml", "*.yml", "configs/*.yaml", "configs/*.yml", "configs/recipes/*.yaml"):
        yield from (root.name(path) for path in sorted(root.folder.glob(pattern)) if path.is_file())
