"""The runs of a campaign of faults: their command, processes, checkpoints and numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from mindspeed_simpo.errors import CheckpointError
from mindspeed_simpo.training.checkpoint import find, list_checkpoints

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart"
RANKS, STEPS, SAVE_INTERVAL = 2, 40, 3
LIMIT_S = 120.0
SETTINGS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "DP2, sharded optimizer, saves in background": {"use_distributed_optimizer": True, "async_save": True},
}
_OF_TIME = ("step_seconds", "pairs_per_second", "tokens_per_second", "peak_memory_bytes")


class Launched:
    """A run as a user starts it: the launcher and its ranks."""

    def __init__(self, folder: Path, setting: str) -> None:
        """Start the command of a setting; where ``folder`` has a run of it already, that run goes on."""
        self.folder, self.setting, self.output = folder, setting, folder / "out"
        self.checkpoints = self.output / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "run.yaml"
        values = {
            "model_name_or_path": str(QUICKSTART),
            "init_from": "config",
            "data_path": str(QUICKSTART / "train.jsonl"),
            "data_cache_dir": str(folder.parent / "cache"),
            "output_dir": str(self.output),
            "load": "auto",
            "seq_length": 64,
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "train_iters": STEPS,
            "save_interval": SAVE_INTERVAL,
            "save_total_limit": 3,
            "lr": 1.0e-3,
            "device": "cpu",
        }
        config.write_text(yaml.safe_dump(values | SETTINGS[setting]), encoding="utf-8")
        command = [sys.executable, "-m", "mindspeed_simpo", "train", str(config), "--nproc-per-node", str(RANKS)]
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        with (folder / "stderr").open("ab") as stderr:
            self.launcher = subprocess.Popen(command, stderr=stderr, env=environment | {"OMP_NUM_THREADS": "1"})
        self._ranks: list[int] = []

    @property
    def steps(self) -> int:
        """Number of steps in the metrics."""
        metrics = self.output / "metrics.jsonl"
        return metrics.read_bytes().count(b'"split": "train"') if metrics.exists() else 0

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any(self.checkpoints.glob(".iter_*.incomplete"))

    @property
    def ended(self) -> bool:
        """Whether the launcher has ended."""
        return self.launcher.poll() is not None

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in rank order, as long as the launcher runs."""
        pid = self.launcher.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        found = {}
        for child in children.read_text().split() if children.exists() else []:
            entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            variables = dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)
            if b"RANK" in variables:
                found[int(variables[b"RANK"])] = int(child)
        self._ranks = [found[rank] for rank in sorted(found)] or self._ranks
        return self._ranks

    def wait(self) -> int:
        """Exit code of the run, once all of its processes have ended; 128 + N for a launcher that signal N killed."""
        deadline = time.monotonic() + LIMIT_S
        while not self.ended or self.survivors():
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        code = self.launcher.poll()
        return -1 if code is None else code if code >= 0 else 128 - code

    def survivors(self) -> list[int]:
        """Ranks that still run after the launcher has ended."""
        return [pid for pid in self._ranks if _runs(pid)] if self.ended else []

    def kill(self) -> None:
        """End every process that is left."""
        for pid in self.ranks():
            if _runs(pid):
                os.kill(pid, signal.SIGKILL)
        self.launcher.kill()
        self.launcher.wait()

    def stderr(self) -> str:
        """The last lines that the runs of this folder wrote."""
        return (self.folder / "stderr").read_text(errors="replace")[-1000:]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def problems_of(output: Path) -> list[str]:
    """What is wrong with the checkpoints and the metrics of a run that has ended."""
    problems = []
    for checkpoint in list_checkpoints(output / "checkpoints"):
        try:
            find(str(checkpoint), None)
        except CheckpointError as error:
            problems.append(f"{checkpoint.name}: {error}")
    for number, line in enumerate(_lines(output), start=1):
        try:
            json.loads(line)
        except ValueError:
            problems.append(f"metrics.jsonl:{number}: {line[:80]!r}")
    return problems


def differences(output: Path, expected: Path) -> list[str]:
    """How the end of a run differs from that of a run without faults."""
    found = []
    if _digests(output) != _digests(expected):
        found.append("parameters, optimizer state or random state differ")
    if _numbers(output) != _numbers(expected):
        found.append("metrics differ")
    return found


def _digests(output: Path) -> dict[str, str]:
    files = output / "checkpoints" / f"iter_{STEPS:07d}" / "files.json"
    if not files.exists():
        return {}
    records = json.loads(files.read_text())["files"]
    return {name: record["blake2b"] for name, record in records.items() if name.startswith("rank_")}


def _numbers(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in _lines(output)]
    return [{key: value for key, value in line.items() if key not in _OF_TIME} for line in lines]


def _lines(output: Path) -> list[str]:
    metrics = output / "metrics.jsonl"
    return metrics.read_text().splitlines() if metrics.exists() else []
