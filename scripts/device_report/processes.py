"""Sections as processes of their own, so that one that crashes or hangs leaves the others and what they found."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mindspeed_simpo.cli.launch import Rendezvous
from scripts.device_report.job import Job

_GRACE_S = 5.0
"""Seconds that the other ranks get after one has failed."""
_LOG_CHARACTERS = 3000


@dataclass(frozen=True)
class Outcome:
    """How a section ended."""

    status: Literal["done", "failed", "timed out"]
    seconds: float
    error: str = ""
    """The end of what the failed process wrote."""


class Processes:
    """Starts processes for a device.

    On an accelerator each process is a new interpreter, for a device that was used cannot be used after a fork. On a
    CPU processes are forked from one that has imported everything.

    Args:
        on_cpu: Whether the device is the CPU.
    """

    def __init__(self, *, on_cpu: bool) -> None:
        self._context: Any = mp.get_context("forkserver" if on_cpu else "spawn")
        if on_cpu:
            self._context.set_forkserver_preload(["scripts.device_report.preload"])

    def run(self, module: str, jobs: Sequence[Job], seconds: float) -> Outcome:
        """``module.run(job)`` in a process for each job, as ranks that can reach each other.

        Args:
            module: Importable name.
            jobs: One for each rank.
            seconds: After these the processes are killed.
        """
        logs = [jobs[0].rows.with_suffix(f".{job.rank}.log") for job in jobs]
        rendezvous = Rendezvous() if len(jobs) > 1 else None
        shared = {} if rendezvous is None else rendezvous.environment
        begin = time.monotonic()
        processes = [
            self._context.Process(target=_child, args=(module, job, log, shared))
            for job, log in zip(jobs, logs, strict=True)
        ]
        for process in processes:
            process.start()
        try:
            if rendezvous is not None:
                rendezvous.serve()
            in_time = _wait(processes, begin + seconds)
        finally:
            for process in processes:
                if process.is_alive():
                    _kill(process.pid)
                process.join()
        taken = time.monotonic() - begin
        failed = [rank for rank, process in enumerate(processes) if process.exitcode]
        if not in_time:
            return Outcome("timed out", taken, f"killed after {seconds:.0f} s\n{_tail(logs[0])}".strip())
        if failed:
            said = {rank: _reason(processes[rank].exitcode, _tail(logs[rank])) for rank in failed}
            # a rank that was killed because another one had failed is no cause
            causes = {rank: text for rank, text in said.items() if processes[rank].exitcode != -signal.SIGKILL} or said
            named = [f"rank {rank}: {text}" if len(jobs) > 1 else text for rank, text in causes.items()]
            return Outcome("failed", taken, "\n".join(named))
        return Outcome("done", taken)


def _child(module: str, job: Job, log: Path, shared: dict[str, str]) -> None:
    os.setsid()  # Ctrl-C of the terminal reaches the report alone, and what the section starts dies with it
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if shared:
        own = {"RANK": str(job.rank), "WORLD_SIZE": str(job.ranks), "LOCAL_RANK": str(job.rank)}
        os.environ.update(shared | own)
    try:
        importlib.import_module(module).run(job)
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None


def _wait(processes: Sequence[Any], deadline: float) -> bool:
    """Whether all ended in time; soon after one has failed, the others are not waited for any more."""
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        if time.monotonic() > deadline:
            return any(process.exitcode for process in processes)
        time.sleep(0.02)
    return True


def _kill(pid: int) -> None:
    """The process with what it has started; before it has a group of its own, it alone."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
            return


def _reason(code: int, tail: str) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}\n{tail}".strip()
    return tail or f"exit code {code}"


def _tail(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace")[-_LOG_CHARACTERS:].strip()
    except OSError:
        return ""
