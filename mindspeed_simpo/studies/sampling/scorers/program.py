"""Scores by a program of the user's: JSON lines in, JSON lines out."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from mindspeed_simpo.data.problems import found
from mindspeed_simpo.errors import SimpoError
from mindspeed_simpo.studies.sampling.record import Candidates

_EXIT_SECONDS = 10.0


class ScorerError(SimpoError):
    """A scorer's program cannot be started, ends too early, is silent, or writes what is no line of scores."""


class ScorerProgram:
    """One process for all prompts, which reads a line for each prompt and writes a line for each, in order.

    All lines are written ahead, as far as the pipe takes them, and its stdin is closed behind the last one: the program
    may answer line by line, or read everything first.

    Args:
        command: Words of the command as a shell would read them; no shell runs it.
        timeout: Longest time between two lines, seconds.

    Raises:
        ScorerError: where there is no such program.
    """

    def __init__(self, command: str, timeout: float) -> None:
        self._command, self._timeout = command, timeout
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise ScorerError(f"--scorer: {command!r} is no command: {error}") from None
        if not self._words or shutil.which(self._words[0]) is None:
            raise ScorerError(f"--scorer: cannot start {command!r}: there is no such program")

    def scores(self, items: Iterable[Candidates]) -> Iterator[list[float | None]]:
        """See :class:`~mindspeed_simpo.studies.sampling.record.Scorer`.

        Raises:
            ScorerError: naming the command, and what it did.
        """
        process = self._start()
        asked: queue.SimpleQueue[Candidates | BaseException | None] = queue.SimpleQueue()
        lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=_write, args=(process, items, asked), daemon=True).start()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        try:
            while (item := asked.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield self._parsed(self._next_line(process, lines, item), item)
            self._finish(lines)
        finally:
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            # a Python program that does not flush its lines would seem to be silent
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            return subprocess.Popen(self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        except OSError as error:
            raise ScorerError(f"--scorer: cannot start {self._command!r}: {error}") from None

    def _next_line(
        self, process: subprocess.Popen[bytes], lines: queue.SimpleQueue[bytes | None], item: Candidates
    ) -> bytes:
        try:
            line = lines.get(timeout=self._timeout)
        except queue.Empty:
            raise ScorerError(
                f"--scorer: {self._command!r} wrote nothing for {self._timeout:g} s, and has not scored "
                f"{item.prompt.source} (--timeout sets this time)"
            ) from None
        if line is None:
            code = process.wait()
            raise ScorerError(
                f"--scorer: {self._command!r} ended with exit code {code} before it scored {item.prompt.source}; "
                "what it scored is kept"
            )
        return line

    def _parsed(self, line: bytes, item: Candidates) -> list[float | None]:
        where = f"--scorer: {self._command!r}, line for {item.prompt.source}"
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            raise ScorerError(f"{where}: not JSON: {line[:200].decode('utf-8', 'replace')!r}") from None
        scores = reply.get("scores") if isinstance(reply, dict) else None
        if not isinstance(scores, list):
            raise ScorerError(f'{where}: expected {{"scores": [...]}}, found {found(reply)}')
        if len(scores) != len(item.texts):
            raise ScorerError(f"{where}: {len(scores)} scores for {len(item.texts)} answers")
        return [self._score(score, where) for score in scores]

    @staticmethod
    def _score(score: Any, where: str) -> float | None:
        if score is None:
            return None
        number = isinstance(score, int | float) and not isinstance(score, bool)
        if not number or not math.isfinite(score):
            raise ScorerError(f"{where}: expected finite numbers or null, found {found(score)}")
        return float(score)

    def _finish(self, lines: queue.SimpleQueue[bytes | None]) -> None:
        try:
            extra = lines.get(timeout=min(_EXIT_SECONDS, self._timeout))
        except queue.Empty:
            return
        if extra is not None:
            raise ScorerError(
                f"--scorer: {self._command!r} wrote more lines than it was given, the first of them "
                f"{extra[:200].decode('utf-8', 'replace')!r}: its scores may belong to other prompts; "
                "mend the program and remove scores.jsonl from the work folder"
            )


def _write(process: subprocess.Popen[bytes], items: Iterable[Candidates], asked: queue.SimpleQueue[Any]) -> None:
    assert process.stdin is not None
    try:
        for item in items:
            line = {
                "index": item.prompt.index,
                "source": item.prompt.source,
                "prompt": item.prompt.prompt.messages[-1].content,
                "messages": item.prompt.messages,
                "answers": list(item.texts),
                **({"columns": item.prompt.columns} if item.prompt.columns else {}),
            }
            asked.put(item)
            try:
                process.stdin.write(json.dumps(line, default=str).encode() + b"\n")
                process.stdin.flush()
            except OSError:  # it has ended, which the reader finds
                continue
        asked.put(None)
    except BaseException as error:
        asked.put(error)
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()


def _read(process: subprocess.Popen[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    assert process.stdout is not None
    with process.stdout as stdout:
        for line in stdout:
            if line.strip():
                lines.put(line)
    lines.put(None)
