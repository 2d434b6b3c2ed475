"""The process between the page and a run: it outlives the page, hands signals on and records how the run ended.

``python -m mindspeed_simpo.studies.ui.supervisor RECORD LOCK RANKS WORD...`` runs the program with the command line
``WORD...``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mindspeed_simpo.studies.whole_file import write_whole


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a run's record, completely or not at all."""
    write_whole(path, json.dumps(record, indent=1) + "\n")


def supervise(path: Path, lock: int, words: Sequence[str], nproc: int) -> int:
    """Run a command to its end.

    The first SIGTERM is handed on to the command, which saves and ends; the second one kills the command.

    Args:
        path: The run's record, ``run.json``.
        lock: Descriptor of a locked file, which the command inherits: the lock is held as long as either lives.
        words: Command line of the program.
        nproc: Ranks, for the record.

    Returns:
        The command's exit code, 128 + N where signal N ended it.
    """
    record: dict[str, Any] = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "ranks": nproc,
        "words": list(words),
        "started": time.time(),
        "stop_requests": 0,
        "ended": None,
        "exit_code": None,
    }
    write_record(path, record)
    child: list[subprocess.Popen[bytes]] = []

    def receive(number: int, _frame: FrameType | None) -> None:
        record["stop_requests"] += 1
        write_record(path, record)
        for process in child:
            process.send_signal(number if record["stop_requests"] == 1 else signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, receive)
    child.append(subprocess.Popen([sys.executable, "-m", "mindspeed_simpo", *words], pass_fds=(lock,)))
    if record["stop_requests"]:  # between the handler and the start
        child[0].terminate()
    code = child[0].wait()
    record |= {"ended": time.time(), "exit_code": code if code >= 0 else 128 - code}
    write_record(path, record)
    return int(record["exit_code"])


if __name__ == "__main__":
    raise SystemExit(supervise(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[4:], int(sys.argv[3])))
