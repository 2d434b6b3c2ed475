"""Encoding many rows: in this process, or in parallel ones, in order and with a progress bar."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import connection, get_context, parent_process

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mindspeed_simpo.batch import TokenizedPair
from mindspeed_simpo.data.encoding import EncodedPair, PairEncoder
from mindspeed_simpo.data.rows import ConversationPair
from mindspeed_simpo.data.turns import ProblemKind, RowError
from mindspeed_simpo.errors import DataError

SMALL = 2000
"""Rows below which starting processes costs more than it saves."""
_CHUNK = 64


@dataclass(frozen=True)
class PlacedRow:
    """A row of one source, before encoding."""

    source: int
    line: int
    value: ConversationPair | TokenizedPair | RowError


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used."""

    kind: ProblemKind
    message: str


@dataclass(frozen=True)
class PlacedResult:
    """A row of one source, after encoding."""

    source: int
    line: int
    value: EncodedPair | Problem


def encode_rows(
    rows: Iterable[PlacedRow], encoder: PairEncoder, *, num_workers: int, total: int | None = None
) -> Iterator[PlacedResult]:
    """Encode rows in order.

    Args:
        rows: Read lazily; few more than are being encoded are held.
        encoder: Sent to the processes.
        num_workers: Processes; 0 means one per core. Fewer than ``SMALL`` rows are encoded in this process.
        total: About the number of rows, for a progress bar on stderr; ``None`` shows none.

    Raises:
        DataError: where a process dies.
    """
    rows = iter(rows)
    first = list(islice(rows, SMALL))
    workers = num_workers or _cores()
    if workers == 1 or len(first) < SMALL:
        results: Iterator[PlacedResult] = (_encode(row, encoder) for row in chain(first, rows))
    else:
        results = _parallel(chain(first, rows), encoder, workers)
    return results if total is None else _shown(results, total)


def _encode(row: PlacedRow, encoder: PairEncoder) -> PlacedResult:
    if isinstance(row.value, RowError):
        return PlacedResult(row.source, row.line, Problem(row.value.kind, row.value.message))
    try:
        value: EncodedPair | Problem = encoder.encode(row.value)
    except RowError as error:
        value = Problem(error.kind, error.message)
    return PlacedResult(row.source, row.line, value)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parallel(rows: Iterator[PlacedRow], encoder: PairEncoder, workers: int) -> Iterator[PlacedResult]:
    # spawn: a fork of a process whose libraries have started threads can wait for ever on a lock that one of them held.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(encoder,))
    pending: deque[Future[list[PlacedResult]]] = deque()
    try:
        while chunk := list(islice(rows, _CHUNK)):
            pending.append(pool.submit(_encode_chunk, chunk))
            if len(pending) >= 4 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a tokenising process died; most often memory ran out, or the program that imports this package has no "
            "`if __name__ == '__main__':` guard: set num_workers: 1 to tokenise in one process"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_encoder: PairEncoder | None = None


def _start_worker(encoder: PairEncoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    # One process a core is the parallelism; the interrupt is the parent's to handle.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _encode_chunk(rows: list[PlacedRow]) -> list[PlacedResult]:
    if _worker_encoder is None:
        raise RuntimeError("the worker was not started")
    return [_encode(row, _worker_encoder) for row in rows]


def _shown(results: Iterator[PlacedResult], total: int) -> Iterator[PlacedResult]:
    columns = (
        TextColumn("Tokenising"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TextColumn("{task.completed} rows"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("tokenise", total=total)
        for result in results:
            yield result
            bar.advance(task)
        # The total counts blank lines too.
        bar.update(task, total=bar.tasks[task].completed)
