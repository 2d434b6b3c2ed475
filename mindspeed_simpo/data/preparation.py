"""The examples of some sources, tokenised in shards that processes, ranks and hosts may share, to one cache file."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mindspeed_simpo.data.cache import CachedTable, read_table, write_batches
from mindspeed_simpo.data.conversations import ExampleReader
from mindspeed_simpo.data.encoding import PairEncoder
from mindspeed_simpo.data.grouping import grouped
from mindspeed_simpo.data.layouts import single_answer
from mindspeed_simpo.data.source import Example, Source, decoded
from mindspeed_simpo.data.workers import Block, ExampleEncoder, PlacedExample, cores, write_shards
from mindspeed_simpo.errors import DataError

logger = logging.getLogger(__name__)

BLOCK_EXAMPLES = 2048
"""Examples of a shard; what is lost at most of each process where a run is killed."""


@dataclass(frozen=True)
class Preparation:
    """The work of tokenising the examples of some sources, and where its result lies.

    Examples are numbered over all sources and divided into blocks of ``BLOCK_EXAMPLES``. Each block becomes a shard, a
    file beside the cache file that is whole or absent; a shard with fewer examples is the last one. When all shards are
    there, they become the cache file. A run that was killed goes on with the shards that are missing.
    """

    sources: Sequence[Source]
    reader: ExampleReader
    encoder: PairEncoder
    path: Path
    """The cache file."""

    @property
    def folder(self) -> Path:
        """Folder of the shards."""
        return self.path.with_suffix(".shards")

    def load(self, *, verified: bool = False) -> CachedTable | None:
        """The cache file, or ``None`` where it is absent or damaged; ``verified`` as in :func:`read_table`."""
        return read_table(self.path, verified=verified)

    def tokenise_share(self, index: int, count: int, *, num_workers: int, progress: bool) -> None:
        """Write the missing shards among ``index``, ``index + count`` and so on.

        Args:
            index: Which share, from 0.
            count: Number of shares, each of which one process of this or another host works on.
            num_workers: Worker processes; 0 means one per core.
            progress: Show a progress bar on stderr.

        Raises:
            DataError: where data cannot be read or written.
        """
        # Only a progress bar needs the count, which reads JSON arrays once more.
        total = sum(source.count() for source in self.sources) // count if progress else None
        with _progress_bar(total) as advance:
            write_shards(
                self._blocks(index, count), ExampleEncoder(self.reader, self.encoder), num_workers or cores(), advance
            )

    def merge(self) -> CachedTable:
        """Make the cache file of all shards and remove them.

        Raises:
            DataError: where a shard is missing, or the file cannot be written or read back.
        """
        if (table := self.load()) is None:
            write_batches(self.path, self._shard_batches())
            table = self.load()
        if table is None:
            raise DataError(
                f"{self.path}: the tokenised data cannot be read back; set data_cache_dir to another folder"
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        return table

    def _shard(self, number: int) -> Path:
        return self.folder / f"{number:07d}.arrow"

    def _shard_batches(self) -> Iterator[Any]:
        number, examples = 0, BLOCK_EXAMPLES
        while examples == BLOCK_EXAMPLES:
            shard = read_table(self._shard(number))
            if shard is None:
                raise DataError(f"{self._shard(number)}: this part of the tokenised data is missing: run again")
            examples = shard.table.num_rows
            yield from shard.table.to_batches()
            number += 1

    def _blocks(self, index: int, count: int) -> Iterator[Block]:
        """The blocks of a share that are not tokenised yet."""
        examples, number = self._examples(), 0
        while True:
            block = list(islice(examples, BLOCK_EXAMPLES))
            path = self._shard(number)
            if number % count == index and read_table(path) is None:
                yield Block(path, block)
            if len(block) < BLOCK_EXAMPLES:
                return
            number += 1

    def _examples(self) -> Iterator[PlacedExample]:
        for index, source in enumerate(self.sources):
            try:
                for number, value in self._of_source(source):
                    yield PlacedExample(index, number, value)
            except OSError as error:
                raise DataError(f"{source.name}: cannot read the data: {error.strerror or error}") from None

    def _of_source(self, source: Source) -> Iterator[Example]:
        """The examples of a source; decoded already only where single answers have to be grouped."""
        prompts, score = self.reader.prompt_columns, self.reader.score
        first = next(source.raw_examples(), None)
        if first is not None and single_answer(decoded(first[1]), prompts, score) is not None:
            return grouped(source.examples(), prompts, score)
        return source.raw_examples()


@contextmanager
def _progress_bar(total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, as the function that advances it; ``None`` shows none."""
    if total is None:
        yield lambda _: None
        return
    columns = (
        TextColumn("Tokenising"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TextColumn("{task.completed} rows"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("tokenise", total=total)
        yield lambda examples: bar.advance(task, examples)
        # The total counts blank lines too, and would end the bar below 100 %.
        bar.update(task, total=bar.tasks[task].completed)
