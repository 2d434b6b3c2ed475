"""Locks of files, by which a run is known to be alive: the system releases them however a process ends."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO


def acquire(lock: IO[str]) -> bool:
    """Lock an open file; False where another process has locked it."""
    for _ in range(20):  # a page that looks whether the lock is held has it for a moment
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False


def is_held(path: Path) -> bool:
    """Whether a process has locked a file."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def held_by_trainer(folder: Path) -> bool:
    """Whether the trainer's lock of the folder is held, by a process that this host knows."""
    try:
        owner = json.loads((folder / ".lock").read_text(encoding="utf-8"))
        if owner["host"] == socket.gethostname():
            os.kill(int(owner["process"]), 0)  # a look at the lock could refuse a run that starts now
    except PermissionError:  # it lives, and is another user's
        pass
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return is_held(folder / ".lock")
