"""One training of a sweep: its folder, its process, and what it leaves."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mindspeed_simpo.studies.sweep.plan import CHOSEN, Goal

LOG_FILE = "train.log"
"""What the training of a trial prints, in its folder."""
_LAST_LINES = 5


class Running(Protocol):
    """A training that runs: the part of ``subprocess.Popen`` that a sweep needs."""

    def poll(self) -> int | None:
        """The exit code, minus the signal's number where one ended the process; None while it runs."""

    def send_signal(self, number: int, /) -> None:
        """Send a signal."""

    def kill(self) -> None:
        """Send SIGKILL."""


Start = Callable[[Sequence[str], Path], Running]
"""``start(words, log)`` starts ``mindspeed-simpo WORDS`` in a session of its own, with its output appended to ``log``.
The process dies with this one."""


@dataclass(frozen=True)
class Outcome:
    """What a training that has ended gave: its evaluations, or an error."""

    evaluations: Sequence[Mapping[str, Any]] = ()
    error: str | None = None


def trial_folder(sweep: Path, slot: int) -> Path:
    """The output folder of a trial."""
    return sweep / f"trial_{slot:04d}"


def outcome(folder: Path, code: int, log_start: int, goal: Goal) -> Outcome:
    """What a training left.

    Args:
        folder: The trial's folder.
        code: The exit code of the training.
        log_start: Size of the log before this start, bytes.
        goal: What the trials are compared by.
    """
    if code:
        return Outcome(error=_error_of(folder / LOG_FILE, code, log_start))
    lines = evaluations_of(folder)
    if not lines or lines[0]["step"] != 0:
        return Outcome(error=f"{folder / 'metrics.jsonl'} has no evaluation before the first step")
    for name in (goal.metric, CHOSEN):
        for line in (lines[0], lines[-1]):
            if name not in line:
                known = ", ".join(key for key in line if key not in ("step", "split"))
                return Outcome(error=f"the evaluation at step {line['step']} has no metric {name}; it has {known}")
            if line[name] is None or not math.isfinite(line[name]):
                return Outcome(error=f"{name} of the held-out pairs is not finite at step {line['step']}")
    return Outcome(evaluations=lines)


def evaluations_of(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a run in the order of their steps; none where there is no run."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the line that is being written
            continue
        if line.get("split") == "eval":
            lines.append(line)
    return lines


def _error_of(log: Path, code: int, log_start: int) -> str:
    """The messages at the end of a training's log, or the last lines of the log."""
    with log.open("rb") as file:
        file.seek(log_start)
        lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = "\n".join((errors or lines)[-_LAST_LINES:])
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the host may be out of memory" if -code == signal.SIGKILL else ""
        return f"the training was killed by {name}{hint}\n{said}".rstrip()
    return said or f"the training ended with exit code {code}"
