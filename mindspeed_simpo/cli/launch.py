"""Start ranks on this host, and make sure that none outlives its launcher."""

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
    """Settle how this process ends: with its launcher, on SIGTERM, and its forked helpers with it.

    A rank that :func:`launch` started is killed by the kernel when the launcher dies, even by SIGKILL: no orphan goes
    on writing checkpoints. A rank keeps SIGTERM's default action, which works inside a blocked collective too; a
    process of its own unwinds and exits 143.
    """
    launcher = os.environ.get(_LAUNCHER_PID)
    if launcher is not None:
        _die_with_parent()
        if os.getppid() != int(launcher):  # it died before the request above took hold
            os._exit(128 + signal.SIGKILL)
    elif not in_launched_rank():
        signal.signal(signal.SIGTERM, _exit_on_signal)
    os.register_at_fork(after_in_child=_prepare_helper)


def launch(nproc: int, argv: Sequence[str]) -> int:
    """Run ``python -m mindspeed_simpo ARGV`` on ``nproc`` ranks of this host and wait for all of them.

    stdout and stderr of the ranks pass through. A rank that fails brings the others down. ``OMP_NUM_THREADS`` is this
    host's cores divided by the ranks where it is not set.

    Returns:
        0, or the exit code of the rank that failed first (128 + N where signal N killed it or this process).
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    logging.disable(logging.CRITICAL)  # elastic's own loggers set their level anew; the ranks speak for themselves
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
    rank = min(exit_codes, key=lambda rank: (_remoteness(exit_codes[rank], exit_codes.values()), rank))
    code = exit_codes[rank]
    if code in _LOST_A_PEER:
        return 1
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    hint = "; the host may be out of memory" if -code == signal.SIGKILL else ""
    sys.stderr.write(f"error: rank {rank} was killed by {name}{hint}\n")
    return 128 - code


def _remoteness(exit_code: int, others: Collection[int]) -> int:
    """How far an exit code is from the cause: an error, a signal, a lost peer, a launcher that ends the others."""
    if exit_code in _LOST_A_PEER:
        return 2
    # torch's launcher ends the others by SIGTERM, and by SIGKILL where that is of no effect
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
