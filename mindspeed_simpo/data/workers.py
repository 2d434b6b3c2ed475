"""Many examples to token ids: in this process or in worker processes, in order and with a progress bar."""

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
from mindspeed_simpo.data.conversations import ConversationPair
from mindspeed_simpo.data.encoding import EncodedPair, PairEncoder
from mindspeed_simpo.data.problems import ExampleError, ProblemKind
from mindspeed_simpo.errors import DataError

SMALL = 2000
"""Examples below which starting processes costs more time than it saves."""
_CHUNK = 64


@dataclass(frozen=True)
class PlacedExample:
    """An example and its place, before encoding."""

    source: int
    """Index of its source."""
    number: int
    """Its number in that source, see :data:`~mindspeed_simpo.data.source.Example`."""
    value: ConversationPair | TokenizedPair | ExampleError


@dataclass(frozen=True)
class Problem:
    """Why an example cannot be used."""

    kind: ProblemKind
    message: str


@dataclass(frozen=True)
class PlacedResult:
    """An example and its place, after encoding."""

    source: int
    number: int
    value: EncodedPair | Problem


def encode_examples(
    examples: Iterable[PlacedExample], encoder: PairEncoder, *, num_workers: int, total: int | None = None
) -> Iterator[PlacedResult]:
    """Encode examples in order.

    Args:
        examples: Read lazily: at most ``SMALL`` of them and the chunks of the processes are in memory.
        encoder: Sent to each process once.
        num_workers: Processes; 0 means one per core. Fewer than ``SMALL`` examples are encoded in this process.
        total: About the number of examples, for a progress bar on stderr; ``None`` shows none.

    Raises:
        DataError: where a process dies.
    """
    examples = iter(examples)
    first = list(islice(examples, SMALL))
    workers = num_workers or _cores()
    if workers == 1 or len(first) < SMALL:
        results: Iterator[PlacedResult] = (_encode(example, encoder) for example in chain(first, examples))
    else:
        results = _parallel(chain(first, examples), encoder, workers)
    return results if total is None else _with_progress_bar(results, total)


def _encode(example: PlacedExample, encoder: PairEncoder) -> PlacedResult:
    if isinstance(example.value, ExampleError):
        return PlacedResult(example.source, example.number, Problem(example.value.kind, example.value.message))
    try:
        value: EncodedPair | Problem = encoder.encode(example.value)
    except ExampleError as error:
        value = Problem(error.kind, error.message)
    return PlacedResult(example.source, example.number, value)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parallel(examples: Iterator[PlacedExample], encoder: PairEncoder, workers: int) -> Iterator[PlacedResult]:
    # spawn, not fork: a forked process can deadlock on a lock that a thread of the parent held.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(encoder,))
    pending: deque[Future[list[PlacedResult]]] = deque()
    try:
        while chunk := list(islice(examples, _CHUNK)):
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
    # The processes themselves are the parallelism; the parent process alone handles Ctrl-C.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _encode_chunk(examples: list[PlacedExample]) -> list[PlacedResult]:
    if _worker_encoder is None:
        raise RuntimeError("the worker was not started")
    return [_encode(example, _worker_encoder) for example in examples]


def _with_progress_bar(results: Iterator[PlacedResult], total: int) -> Iterator[PlacedResult]:
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
        # The total counts blank lines too, and would end the bar below 100 %.
        bar.update(task, total=bar.tasks[task].completed)
