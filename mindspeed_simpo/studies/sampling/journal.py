"""What a sampling run has done so far: JSON lines by prompt, appended, of which a kill loses only the newest."""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mindspeed_simpo.errors import ConfigError, DataError
from mindspeed_simpo.studies.whole_file import write_whole

SYNC_SECONDS = 5.0
"""Longest time until a line is on the disk; what a crash of the host, not of the program, loses."""


class Journal:
    """A file of lines ``{"index": prompt, ...}``. Lines are read back when asked for: memory holds their offsets.

    Args:
        path: Made where absent. A last line that a kill left unfinished is cut off.

    Raises:
        DataError: where another line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[int, int] = {}
        self._file = path.open("a+b")
        try:
            self._end = self._read()
        except DataError:
            self._file.close()
            raise
        self._file.truncate(self._end)
        self._synced = time.monotonic()

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, index: int) -> bool:
        return index in self._offsets

    def __getitem__(self, index: int) -> Any:
        self._file.seek(self._offsets[index])
        return json.loads(self._file.readline())

    def add(self, index: int, record: Mapping[str, Any]) -> None:
        """Append the record of a prompt; the first one counts."""
        if index in self._offsets:
            return
        line = json.dumps({"index": index, **record}, ensure_ascii=True).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._offsets[index] = self._end
        self._end += len(line)
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()

    def _read(self) -> int:
        """Note the offsets of all records; returns the end of the last whole line."""
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                self._offsets.setdefault(int(json.loads(line)["index"]), end)
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{self.path}:{number}: the line is damaged; remove the file to do its work again"
                ) from None
            end += len(line)
        return end


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a work folder for the body; made where absent. The system releases it when the process ends.

    Raises:
        ConfigError: where another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise ConfigError(f"--output: cannot make {folder}: {error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--output: another process samples into {folder}: wait for its end, or give another --output"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def check_facts(path: Path, facts: Mapping[str, Any], journal: Journal) -> str:
    """Check that a run that goes on asks for what it began with; a run that begins writes the facts down.

    Args:
        path: JSON file of the facts.
        facts: Everything that the lines of the journal depend on, by names that a message shows.
        journal: Their lines; without any, the run begins.

    Returns:
        An identity of the beginning, on which what is made of the lines depends.

    Raises:
        ConfigError: naming what differs.
    """
    facts = json.loads(json.dumps(facts))
    if not len(journal) or not path.exists():
        begun = uuid.uuid4().hex
        write_whole(path, json.dumps({"begun": begun, "facts": facts}, indent=1) + "\n")
        return begun
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        begun, before = str(record["begun"]), record["facts"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: the file is damaged; remove it together with {path.stem}.jsonl") from None
    names = [name for name in {**before, **facts} if before.get(name) != facts.get(name)]
    if names:
        listed = "\n".join(f"  {name}: {_shown(before, name)} before, {_shown(facts, name)} now" for name in names)
        raise ConfigError(
            f"{path.parent}: the {path.stem} were begun with other settings:\n{listed}\n"
            f"Give the same settings to go on, another --output, or remove {path.stem}.jsonl to begin them again."
        )
    return begun


def _shown(facts: Mapping[str, Any], name: str) -> str:
    return json.dumps(facts[name], ensure_ascii=False)[:120] if name in facts else "none"
