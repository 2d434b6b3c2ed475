"""The examples of some sources, tokenised in shards that processes, ranks and hosts may share, to one cache file."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mindspeed_simpo.data.cache import SCHEMA, CachedTable, read_table, write_batches
from mindspeed_simpo.data.conversations import ExampleReader
from mindspeed_simpo.data.encoding import PairEncoder
from mindspeed_simpo.data.grouping import grouped
from mindspeed_simpo.data.layouts import single_answer
from mindspeed_simpo.data.source import Example, Source, decoded
from mindspeed_simpo.data.workers import Block, ExampleEncoder, PlacedExample, cores, write_shards
from mindspeed_simpo.errors import DataError

logger = logging.getLogger(__name__)

BLOCK_EXAMPLES = 2048
"""Places of a shard; what is lost at most of each process where a run is killed."""
_BATCH_ROWS = 16384
"""Rows of a record batch of the cache file: each batch costs every rank some memory of its own."""
_BATCH_BYTES = 256 << 20
"""Bytes from which a record batch of the cache file has no further shard."""


@dataclass(frozen=True)
class Preparation:
    """The work of tokenising the examples of some sources, and where its result lies.

    The examples of each source are divided into blocks: ``BLOCK_EXAMPLES`` places, or the fewer that the source allows,
    where the number of places is known, else as many examples, of which only the last block has fewer. Each block
    becomes a shard, a file beside the cache file that is whole or absent. When all shards are there, they become the
    cache file. A run that was killed goes on with the shards that are missing.
    """

    sources: Sequence[Source]
    reader: ExampleReader
    encoder: PairEncoder
    path: Path
    """The cache file."""
    drops_unreadable: bool = False
    """Whether examples whose images were missing or damaged stay left out, whatever has become of the images: a run
    that goes on has the pairs that it began with. Else their images are read again."""

    @property
    def folder(self) -> Path:
        """Folder of the shards."""
        return self.path.with_suffix(".shards")

    def load(self, *, verified: bool = False) -> CachedTable | None:
        """The cache file, or ``None`` where it is absent or damaged; ``verified`` as in :func:`read_table`."""
        return read_table(self.path, verified=verified)

    def load_reusable(self) -> CachedTable | None:
        """The cache file of an earlier run; one whose images have to be read again is removed."""
        table = self.load()
        if table is not None and self._reads_again(table):
            self.path.unlink(missing_ok=True)
            return None
        return table

    def tokenise_share(self, index: int, shares: int, *, num_workers: int, progress: bool) -> None:
        """See :func:`tokenise_shares`."""
        tokenise_shares([self], index, shares, num_workers=num_workers, progress=progress)

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

    def _reads_again(self, table: CachedTable) -> bool:
        return table.has_unreadable and not self.drops_unreadable

    def _shard(self, source: int, number: int) -> Path:
        return self.folder / f"{source:04d}_{number:07d}.arrow"

    def _shard_batches(self) -> Iterator[Any]:
        rows: list[Any] = []
        for index, source in enumerate(self.sources):
            blocks = self._num_blocks(source)
            for number in count() if blocks is None else range(blocks):
                shard = read_table(self._shard(index, number))
                if shard is None:
                    raise DataError(
                        f"{self._shard(index, number)}: this part of the tokenised data is missing: run again"
                    )
                rows += shard.table.to_batches()
                size = sum(batch.nbytes for batch in rows)
                if sum(batch.num_rows for batch in rows) >= _BATCH_ROWS or size >= _BATCH_BYTES:
                    yield _combined(rows)
                    rows = []
                if blocks is None and shard.table.num_rows < _block_examples(source):
                    break
        yield _combined(rows)

    def _num_blocks(self, source: Source) -> int | None:
        """Number of blocks of a source; ``None`` where only reading all of it tells."""
        places = None if self._in_groups(source) else source.places
        return None if places is None else max(1, -(-places // _block_examples(source)))

    def _in_groups(self, source: Source) -> bool:
        """Whether the rows are single answers, of which adjacent ones become one example."""
        first = next(source.raw_examples(), None)
        columns = self.reader.prompt_columns, self.reader.score
        return first is not None and single_answer(decoded(first[1]), *columns) is not None

    def blocks(self, index: int, shares: int) -> Iterator[Block]:
        """The blocks of a share that are not tokenised yet."""
        for number, source in enumerate(self.sources):
            blocks = self._num_blocks(source)
            # small sources fall to different shares
            own = (index + number) % shares
            try:
                if blocks is None:
                    yield from self._every_block(number, source, own, shares)
                else:
                    yield from self._own_blocks(number, source, own * blocks // shares, (own + 1) * blocks // shares)
            except OSError as error:
                raise DataError(f"{source.name}: cannot read the data: {error.strerror or error}") from None

    def _every_block(self, index: int, source: Source, own: int, shares: int) -> Iterator[Block]:
        """Blocks ``own``, ``own + shares`` and so on of a source that has to be read from its start."""
        if self._in_groups(source):
            examples = grouped(source.examples(), self.reader.prompt_columns, self.reader.score)
        else:
            examples = source.raw_examples()
        for number in count():
            block = list(islice(examples, _block_examples(source)))
            if number % shares == own:
                yield from self._unless_done(index, number, block)
            if len(block) < _block_examples(source):
                return

    def _own_blocks(self, index: int, source: Source, first: int, stop: int) -> Iterator[Block]:
        """Blocks ``first`` to ``stop - 1`` of a source; what lies before and behind them is not read."""
        size = _block_examples(source)
        examples = groupby(source.raw_examples(first * size), lambda example: (example[0] - 1) // size)
        following = next(examples, None) if first < stop else None
        for number in range(first, stop):
            block: list[Example] = []
            if following is not None and following[0] == number:
                block = list(following[1])
                following = next(examples, None)
            yield from self._unless_done(index, number, block)

    def _unless_done(self, source: int, number: int, examples: Sequence[Example]) -> Iterator[Block]:
        path = self._shard(source, number)
        table = read_table(path)
        if table is None or self._reads_again(table):
            yield Block(path, [PlacedExample(source, place, value) for place, value in examples])


def tokenise_shares(works: Sequence[Preparation], index: int, shares: int, *, num_workers: int, progress: bool) -> None:
    """Write the missing shards of one share of each work.

    Args:
        works: Those with one cache file are done once.
        index: Which share, from 0.
        shares: Number of shares, each of which one process of this or another host works on.
        num_workers: Worker processes; 0 means one per core.
        progress: Show a progress bar on stderr.

    Raises:
        DataError: where data cannot be written; where they cannot be read, and then without the shards of that work,
            which would not serve corrected data.
    """
    works = [*{work.path: work for work in works}.values()]
    places = [source.places for work in works for source in work.sources]
    total = None if None in places else sum(filter(None, places)) // shares
    unreadable: list[Preparation] = []
    encoders = [
        ExampleEncoder(work.reader, work.encoder, tuple(source.folder for source in work.sources)) for work in works
    ]

    def blocks() -> Iterator[Block]:
        for number, work in enumerate(works):
            try:
                # small works fall to different shares
                for block in work.blocks((index + number) % shares, shares):
                    yield dataclasses.replace(block, encoder=number)
            except DataError:
                unreadable.append(work)
                raise

    try:
        with _progress_bar(total, shown=progress) as advance:
            write_shards(blocks(), encoders, num_workers or cores(), advance)
    finally:
        for work in unreadable:
            shutil.rmtree(work.folder, ignore_errors=True)


def _block_examples(source: Source) -> int:
    return min(BLOCK_EXAMPLES, source.block_examples)


def _combined(batches: Sequence[Any]) -> Any:
    """One record batch of all rows."""
    table = pa.Table.from_batches(batches, SCHEMA).combine_chunks()
    return table.to_batches()[0] if table.num_rows else pa.RecordBatch.from_pylist([], schema=SCHEMA)


@contextmanager
def _progress_bar(total: int | None, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, as the function that advances it; a total of ``None`` is not known."""
    if not shown:
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
