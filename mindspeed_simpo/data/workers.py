"""Blocks of examples to shards of token ids: in this process or in worker processes, each shard a file of its own."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from mindspeed_simpo.batch import TokenizedPair
from mindspeed_simpo.data.cache import batches_of, write_batches
from mindspeed_simpo.data.conversations import ConversationPair, ExampleReader
from mindspeed_simpo.data.encoding import EncodedPair, PairEncoder, PlacedResult, Problem
from mindspeed_simpo.data.problems import ExampleError
from mindspeed_simpo.data.source import decoded
from mindspeed_simpo.errors import DataError

PATIENCE_SECONDS = 5.0
"""Time for which examples are encoded in one process: starting others takes about as long."""


@dataclass(frozen=True)
class PlacedExample:
    """An example and its place, before encoding."""

    source: int
    """Index of its source."""
    number: int
    """Its number in that source, see :data:`~mindspeed_simpo.data.source.Example`."""
    value: Any
    """Decoded columns, or ``Undecoded``, ``TokenizedPair`` or ``ExampleError``."""


@dataclass(frozen=True)
class Block:
    """The examples of one shard."""

    path: Path
    examples: list[PlacedExample]
    encoder: int = 0
    """Index of the encoder of its examples."""


@dataclass(frozen=True)
class ExampleEncoder:
    """From an example as its source gives it to token ids; sent to each worker process once."""

    reader: ExampleReader
    encoder: PairEncoder
    folders: tuple[Path | None, ...]
    """Of each source, see :attr:`~mindspeed_simpo.data.source.Source.folder`."""

    def encode(self, example: PlacedExample) -> PlacedResult:
        """Token ids, or the reason why there are none."""
        value: EncodedPair | Problem
        try:
            content = decoded(example.value)
            if isinstance(content, ExampleError):
                raise content
            pair = content if isinstance(content, TokenizedPair) else self.reader.read(content)
            if isinstance(pair, ConversationPair) and pair.images:
                pair = dataclasses.replace(pair, folder=self.folders[example.source])
            value = self.encoder.encode(pair)
        except ExampleError as error:
            value = Problem(error.kind, error.message)
        return PlacedResult(example.source, example.number, value)

    def write(self, block: Block, advance: Callable[[int], None] | None = None) -> int:
        """Write the shard of a block and return its number of examples; ``advance`` is called after each example."""

        def results() -> Iterator[PlacedResult]:
            for example in block.examples:
                yield self.encode(example)
                if advance is not None:
                    advance(1)

        write_batches(block.path, batches_of(results()))
        return len(block.examples)


def write_shards(
    blocks: Iterable[Block], encoders: Sequence[ExampleEncoder], num_workers: int, advance: Callable[[int], None]
) -> None:
    """Write the shard of each block.

    Args:
        blocks: Read lazily: at most two blocks for each process are in memory.
        encoders: Of the examples, see :attr:`Block.encoder`.
        num_workers: Processes; 1 encodes in this process, as do the first ``PATIENCE_SECONDS`` in any case.
        advance: Called with the number of examples that are done since the last call.

    Raises:
        DataError: where a process dies, or a shard cannot be written.
    """
    begin = time.monotonic()
    blocks = iter(blocks)
    for block in blocks:
        if num_workers > 1 and time.monotonic() - begin >= PATIENCE_SECONDS:
            _in_processes(chain([block], blocks), encoders, num_workers, advance)
        else:
            encoders[block.encoder].write(block, advance)


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(
    blocks: Iterable[Block], encoders: Sequence[ExampleEncoder], workers: int, advance: Callable[[int], None]
) -> None:
    # spawn, not fork: a forked process can deadlock on a lock that a thread of the parent held.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(encoders,))
    pending: deque[Future[int]] = deque()
    try:
        for block in blocks:
            pending.append(pool.submit(_write_block, block))
            if len(pending) >= 2 * workers:
                advance(pending.popleft().result())
        while pending:
            advance(pending.popleft().result())
    except BrokenProcessPool:
        raise DataError(
            "a tokenising process died; most often memory ran out, or the program that imports this package has no "
            "`if __name__ == '__main__':` guard: set num_workers: 1 to tokenise in one process"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_encoders: Sequence[ExampleEncoder] | None = None


def _start_worker(encoders: Sequence[ExampleEncoder]) -> None:
    global _worker_encoders
    _worker_encoders = encoders
    # The processes themselves are the parallelism; the parent process alone handles Ctrl-C.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _write_block(block: Block) -> int:
    if _worker_encoders is None:
        raise RuntimeError("the worker was not started")
    return _worker_encoders[block.encoder].write(block)
