"""Launch of the ranks of one host: exit codes, and no rank that outlives its launcher."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import uuid
from collections.abc import Collection, Sequence
from types import FrameType

from mindspeed_simpo.errors import PeerLostError

_LAUNCHER_PID = "MINDSPEED_SIMPO_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1
_LOST_A_PEER = (PeerLostError.exit_code, PeerLostError.timeout_exit_code)


def in_launched_rank() -> bool:
    """Whether a launcher (this module's or torchrun) started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def prepare_process() -> None:
    """Set the signal handlers and parent-death signals of this process and of the processes that it forks.

    The kernel kills a rank that :func:`launch` started when the launcher dies, even by SIGKILL, so that no orphan
    process writes checkpoints. A rank keeps the default action of SIGTERM, which also ends a process that is blocked in
    a collective. A process without a launcher unwinds on SIGTERM and exits with code 143. Forked helper processes are
    killed when their parent dies. The parent-death signal exists on Linux only.
    """
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

    The ranks inherit stdout and stderr. When one rank fails, the launcher ends the others. Where ``OMP_NUM_THREADS`` is
    not set, it becomes the number of this host's cores divided by ``nproc``.

    Args:
        nproc: Number of ranks, at least 1.
        argv: Command line of each rank, without ``--nproc-per-node``.

    Returns:
        0, or the exit code of the rank whose failure caused the others; 128 + N where signal N killed that rank or this
        process.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    logging.disable(logging.CRITICAL)  # torch elastic resets the levels of its loggers; the ranks print the errors
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // nproc)))
    os.environ[_LAUNCHER_PID] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "mindspeed_simpo", *argv)
    except ChildFailedError as error:
        return _report({rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as error:
        return 128 + error.sigval
    finally:
        os.environ.pop(_LAUNCHER_PID, None)
        logging.disable(logging.NOTSET)
    return 0


def _report(exit_codes: dict[int, int]) -> int:
    rank = min(exit_codes, key=lambda rank: (_distance_from_cause(exit_codes[rank], exit_codes.values()), rank))
    code = exit_codes[rank]
    if code in _LOST_A_PEER:
        return 1
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    hint = "; the host may be out of memory" if -code == signal.SIGKILL else ""
    sys.stderr.write(f"error: rank {rank} was killed by {name}{hint}\n")
    return 128 - code


def _distance_from_cause(exit_code: int, others: Collection[int]) -> int:
    """Order of exit codes by distance from the cause: 0 error, 1 signal, 2 lost peer, 3 ended by the launcher."""
    if exit_code in _LOST_A_PEER:
        return 2
    # torch's launcher sends SIGTERM to the remaining ranks, then SIGKILL to those that do not end
    by_launcher = {-signal.SIGTERM} | ({-signal.SIGKILL} if PeerLostError.timeout_exit_code in others else set())
    if exit_code in by_launcher:
        return 3
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
