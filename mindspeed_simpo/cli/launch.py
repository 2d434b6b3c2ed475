"""Launch of the ranks of one host: exit codes, and no rank that outlives its launcher."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from mindspeed_simpo.errors import PeerLostError

_LAUNCHER_PID = "MINDSPEED_SIMPO_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1
_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
GRACE_S = 2.0
"""Seconds that the ranks get to end by themselves after another rank's failure."""
_LOST_A_PEER = (PeerLostError.exit_code, PeerLostError.timeout_exit_code)


def in_launched_rank() -> bool:
    """Whether a launcher (this module's or torchrun) started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def prepare_process() -> None:
    """Set the signal handlers and parent-death signals of this process and of the processes that it forks.

    Call it before torch is imported: ``import torch`` then does not import torch_npu, which would read the environment
    before its defaults are set; the device's room imports torch_npu where it is used.

    The kernel kills a rank that :func:`launch` started when the launcher dies, even by SIGKILL, so that no orphan
    process writes checkpoints. Outside training a rank keeps the default action of SIGTERM, which also ends a process
    that is blocked in a collective. A process without a launcher unwinds on SIGTERM and exits with code 143. Forked
    helper processes are killed when their parent dies. The parent-death signal exists on Linux only.
    """
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    launcher = os.environ.get(_LAUNCHER_PID)
    if launcher is not None:
        _die_with_parent()
        if os.getppid() != int(launcher):  # the launcher died before prctl took effect
            os._exit(128 + signal.SIGKILL)
    elif not in_launched_rank():
        signal.signal(signal.SIGTERM, _exit_on_signal)
    os.register_at_fork(after_in_child=_prepare_helper)


def launch(nproc: int, argv: Sequence[str]) -> int:
    """Run ``python -m mindspeed_simpo ARGV`` on ``nproc`` ranks of this host and wait for all of them.

    The ranks inherit stdout and stderr. The launcher hands signals on to the ranks, and waits as long as the ranks then
    take to save. When one rank fails, the others get ``GRACE_S`` to end by themselves and are then killed. Where
    ``OMP_NUM_THREADS`` is not set, it becomes the number of this host's cores divided by ``nproc``.

    Args:
        nproc: Number of ranks, at least 1.
        argv: Command line of each rank, without ``--nproc-per-node``.

    Returns:
        0, or the exit code of the rank whose failure caused the others; 128 + N where signal N killed that rank or this
        process.
    """
    rendezvous = Rendezvous()
    shared = {
        **rendezvous.environment,
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, _cores() // nproc))),
        _LAUNCHER_PID: str(os.getpid()),
    }
    received: list[int] = []
    ranks: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for process in ranks:
            process.send_signal(number)

    for number in _HANDED_ON:
        signal.signal(number, hand_on)
    try:
        for rank in range(nproc):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "mindspeed_simpo", *argv]
            # a session of its own: Ctrl-C of the terminal reaches a rank once, through the launcher
            ranks.append(subprocess.Popen(command, env=os.environ | shared | own, start_new_session=True))
        rendezvous.serve()  # imports torch, beside the ranks that do too
        killed = _wait(ranks)
    finally:
        for process in ranks:
            process.kill()
    codes = {rank: process.wait() for rank, process in enumerate(ranks)}
    failed = {rank: code for rank, code in codes.items() if code and rank not in killed}
    if received and all(code in (-received[0], 128 + received[0]) for code in failed.values()):
        return 128 + received[0]
    return _report(failed) if failed else 0


def start_program(argv: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start ``python -m mindspeed_simpo ARGV`` as a process that dies with this one; call it in the main thread.

    Ctrl-C of the terminal does not reach the process, which has a session of its own.

    Args:
        argv: Command line of the program.
        log: File to which its output is appended; its folder exists.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "mindspeed_simpo", *argv],
            env=os.environ | {_LAUNCHER_PID: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


class Rendezvous:
    """Where the ranks meet: a store that this process serves, on a port that it holds from the start."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=socket.SOMAXCONN)
        self._store: object = None
        self.environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._listener.getsockname()[1]),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        """Variables of a rank, those of torchrun: ``torch.distributed`` connects to the store and starts none."""

    def serve(self) -> None:
        """Serve the store; ranks that have started already wait for it."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        port, descriptor = self._listener.getsockname()[1], self._listener.detach()
        # torch 2.7's server with libuv takes no open socket
        self._store = TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=descriptor,
            use_libuv=False,
        )


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> set[int]:
    """Wait for all ranks; returns those that were killed because another one had failed."""
    deadline = math.inf
    while any(process.poll() is None for process in ranks):
        if deadline == math.inf and any(process.poll() for process in ranks):
            deadline = time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            left = {rank for rank, process in enumerate(ranks) if process.poll() is None}
            for rank in left:
                ranks[rank].kill()
            return left
        time.sleep(0.05)
    return set()


def _report(exit_codes: dict[int, int]) -> int:
    """Name the rank whose failure caused the others, where no rank has said so; returns its exit code."""
    rank = min(exit_codes, key=lambda rank: (_distance_from_cause(exit_codes[rank]), rank))
    code = exit_codes[rank]
    if code in _LOST_A_PEER:
        return 1
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    hint = "; the host may be out of memory" if -code == signal.SIGKILL else ""
    sys.stderr.write(f"error: rank {rank} was killed by {name}{hint}\n")
    return 128 - code


def _distance_from_cause(exit_code: int) -> int:
    """Order of exit codes by distance from the cause: 0 error, 1 signal, 2 lost peer."""
    if exit_code in _LOST_A_PEER:
        return 2
    return 1 if exit_code < 0 else 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _exit_on_signal(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _prepare_helper() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with_parent()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
