"""The faults of a campaign: each has its moment, what it does to a run, and how the run may end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.fault_run import STEPS, Launched

CONFLICT = 2
KILLED, TERMINATED, USER = 128 + signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGUSR1
SMALL, LARGE = 20 << 20, 400 << 20
"""Bytes of a file system that becomes full, and of the same one afterwards."""
_MS_REMOUNT = 32


class NotAllowedError(Exception):
    """This machine does not allow the fault."""


@dataclass(frozen=True)
class Fault:
    """What happens to a run."""

    name: str
    codes: frozenset[int]
    """Exit codes with which the run may end; 0 where it was quicker than the fault."""
    strike: Callable[[Launched, random.Random], None]
    afterwards: Callable[[Launched, random.Random], None] = lambda run, chance: None  # noqa: ARG005
    """Done after the end of the run and before it goes on."""
    wait_for_moment: Callable[[Launched, random.Random], None] = lambda run, chance: at_random(run, chance)
    clean_up: Callable[[Launched], None] = lambda run: None  # noqa: ARG005


def at_random(run: Launched, chance: random.Random) -> None:
    """Wait for a random step, or for a save after a random step."""
    step, in_save = chance.randrange(1, STEPS - 5), chance.random() < 0.5
    _wait(lambda: run.ended or run.steps >= step)
    if in_save:
        _wait(lambda: run.ended or run.saving)
    run.ranks()


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)


def _send(number: int, run: Launched, chance: random.Random, *, to: str) -> None:
    ranks = run.ranks()
    one = chance.choice(ranks) if ranks else 0
    victims = {"one rank": [one] if one else [], "all ranks": ranks, "the launcher": [run.launcher.pid]}[to]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):  # the run was quicker
            os.kill(pid, number)


def _signal(number: signal.Signals, to: str, *codes: int) -> Fault:
    return Fault(
        f"{number.name} to {to}",
        frozenset({0, *codes}),
        lambda run, chance: _send(number, run, chance, to=to),
    )


def _delay(run: Launched, chance: random.Random) -> None:
    with contextlib.suppress(ProcessLookupError, IndexError):  # the run was quicker
        victim = chance.choice(run.ranks())
        os.kill(victim, signal.SIGSTOP)
        time.sleep(chance.uniform(0.5, 3.0))
        os.kill(victim, signal.SIGCONT)


def _second_run(run: Launched, _chance: random.Random) -> None:
    """Start the same command again; the first of the two that claims the folder goes on, the other ends with 2."""
    second = Launched(run.folder, run.setting)
    codes = sorted((run.wait(), second.wait()))
    if codes != [0, CONFLICT]:
        raise SystemExit(f"error: two runs in one folder end with {codes}: {run.stderr()}")


def _damage(run: Launched, chance: random.Random, harm: Callable[[Path, random.Random], None]) -> None:
    """Harm one file of the newest checkpoint."""
    saved = sorted(run.checkpoints.glob("iter_*"))
    if saved:
        harm(chance.choice(sorted(saved[-1].iterdir())), chance)


def _flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def _damaged(name: str, harm: Callable[[Path, random.Random], None]) -> Fault:
    return Fault(
        name,
        frozenset({0, KILLED}),
        lambda run, chance: _send(signal.SIGKILL, run, chance, to="all ranks"),
        afterwards=lambda run, chance: _damage(run, chance, harm),
    )


def _take_away(run: Launched, _chance: random.Random) -> None:
    shutil.rmtree(run.checkpoints, ignore_errors=True)


def _mount(folder: Path, size: int, flags: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", flags, f"size={size}".encode()) != 0:
        raise NotAllowedError(f"cannot mount a small file system: {os.strerror(ctypes.get_errno())}")


def _on_a_small_disk(run: Launched, _chance: random.Random) -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise NotAllowedError("mounting a small file system needs root on Linux")
    _wait(lambda: run.ended or run.checkpoints.exists())
    run.ranks()


def _fill(run: Launched, chance: random.Random) -> None:
    """Make the disk of the checkpoints small: the next saves find it full."""
    _mount(run.checkpoints, chance.randrange(SMALL // 4, SMALL))


def _enlarge(run: Launched, _chance: random.Random) -> None:
    _mount(run.checkpoints, LARGE, _MS_REMOUNT)


def _unmount(run: Launched) -> None:
    ctypes.CDLL(None).umount2(bytes(run.checkpoints), 2)


FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        _signal(signal.SIGKILL, "one rank", KILLED),
        _signal(signal.SIGKILL, "all ranks", KILLED),
        _signal(signal.SIGKILL, "the launcher", KILLED),
        _signal(signal.SIGTERM, "the launcher", TERMINATED),
        _signal(signal.SIGTERM, "one rank", TERMINATED),
        _signal(signal.SIGUSR1, "the launcher", USER),
        _signal(signal.SIGINT, "the launcher", 128 + signal.SIGINT),
        Fault("a rank is delayed", frozenset({0}), _delay),
        Fault(
            "a second run in the folder",
            frozenset({0, CONFLICT}),
            _second_run,
            wait_for_moment=lambda _run, chance: time.sleep(chance.uniform(0.0, 1.0)),
        ),
        _damaged("a byte of the newest checkpoint flips", _flip),
        _damaged("a file of the newest checkpoint is cut", _cut),
        Fault("the checkpoints are taken away", frozenset({0, 1}), _take_away),
        Fault(
            "the disk is full",
            frozenset({0, 1}),
            _fill,
            afterwards=_enlarge,
            wait_for_moment=_on_a_small_disk,
            clean_up=_unmount,
        ),
    )
}
