"""The output folder of a run: claimed by one run at a time, and the same folder on every host."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import fail_together, of_first_rank

_LOCK = ".lock"


@contextmanager
def claimed(root: Path, groups: Groups) -> Iterator[None]:
    """Hold the output folder for the body; made where it is absent. A collective of the world.

    Rank 0 holds a lock on a file in the folder, which the system releases when the process ends, however it ends.

    Args:
        root: The output folder.
        groups: Process groups of this rank.

    Raises:
        ConfigError: on every rank, where the folder cannot be made, another run holds it, or a rank sees another
            folder than rank 0.
    """
    token = of_first_rank(uuid.uuid4().hex, groups.control)
    lock = None
    try:
        with fail_together(groups.control):
            if groups.world.rank() == 0:
                lock = _lock(root, token)
        with fail_together(groups.control):
            if _owner(root).get("token") != token:
                raise ConfigError(
                    f"output_dir: rank {groups.world.rank()} on {socket.gethostname()} does not see the folder "
                    f"{root} of rank 0; give a folder that all hosts share"
                )
        yield
    finally:
        if lock is not None:
            lock.close()


def _lock(root: Path, token: str) -> IO[str]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / _LOCK).open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output_dir: cannot make {root}: {error}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        owner = _owner(root)
        raise ConfigError(
            f"output_dir: another run writes in {root} (process {owner.get('process')} on {owner.get('host')}, since "
            f"{owner.get('since')}); wait for its end, or give another output_dir"
        ) from None
    except OSError:  # a file system without locks
        pass
    lock.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    json.dump({"token": token, "host": socket.gethostname(), "process": os.getpid(), "since": since}, lock)
    lock.flush()
    return lock


def _owner(root: Path) -> dict[str, object]:
    try:
        found = json.loads((root / _LOCK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
