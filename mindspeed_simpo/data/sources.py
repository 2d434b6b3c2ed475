"""The kinds of data that rows come from, each row with its place."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from mindspeed_simpo.data import indexed
from mindspeed_simpo.data.json_rows import Row, read_json, read_jsonl
from mindspeed_simpo.data.turns import malformed, printable
from mindspeed_simpo.errors import DataError


class Source(ABC):
    """One file or dataset split."""

    place = "{name}:{line}"

    def __init__(self, name: str) -> None:
        self.name = name

    def where(self, line: int) -> str:
        """Name a row in a message."""
        return printable(self.place.format(name=self.name, line=line))

    @abstractmethod
    def digest(self) -> str:
        """Hex SHA-256 of the content; the same wherever the data lies."""

    @abstractmethod
    def count(self) -> int:
        """About the number of rows (blank lines of JSON Lines included), for a progress bar."""

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """The rows in order.

        Raises:
            DataError: where the file as a whole cannot be read.
        """


class JsonSource(Source):
    """A ``.jsonl`` or ``.json`` file; places are line numbers."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(name)
        self._path = path

    def digest(self) -> str:
        """See :meth:`Source.digest`."""
        digest = hashlib.sha256(self._path.suffix.lower().encode())
        with self._path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def count(self) -> int:
        """See :meth:`Source.count`."""
        if self._path.suffix.lower() == ".json":
            return sum(1 for _ in self.rows())
        with self._path.open("rb") as file:
            return sum(1 for _ in file)

    def rows(self) -> Iterator[Row]:
        """See :meth:`Source.rows`."""
        return (read_jsonl if self._path.suffix.lower() == ".jsonl" else read_json)(self._path, self.name)


class TableSource(Source):
    """An Arrow table (Parquet file or dataset split); places are row numbers, counted from 1."""

    place = "{name}:row {line}"

    def __init__(
        self, name: str, num_rows: int, column_names: Sequence[str], batches: Callable[[list[str]], Iterator[Any]]
    ) -> None:
        super().__init__(name)
        self._num_rows = num_rows
        self._columns = list(column_names)
        self._batches = batches

    def digest(self) -> str:
        """See :meth:`Source.digest`."""
        digest = hashlib.sha256()
        writer = None
        for batch in self._batches(self._columns):
            if writer is None:
                sink = pa.PythonFile(_Hasher(digest), mode="w")
                writer = pa.ipc.new_stream(sink, batch.schema.remove_metadata())
            writer.write_batch(batch.replace_schema_metadata(None))
        if writer is not None:
            writer.close()
        return digest.hexdigest()

    def count(self) -> int:
        """See :meth:`Source.count`."""
        return self._num_rows

    def rows(self) -> Iterator[Row]:
        """See :meth:`Source.rows`."""
        number = 0
        for batch in self._batches(self._columns):
            for index in range(batch.num_rows):
                number += 1
                yield number, _table_row(batch, index)
        if not number:
            raise DataError(f"{self.name}: the table has no rows")


class IndexedSource(Source):
    """MindSpeed-LLM's tokenised pairs; places are pair numbers, counted from 1."""

    place = "{name}:pair {line}"

    def __init__(self, prefix: Path, name: str) -> None:
        super().__init__(name)
        self._prefix = prefix

    def digest(self) -> str:
        """See :meth:`Source.digest`."""
        digest = hashlib.sha256(b"indexed")
        for path in indexed.files_of(self._prefix):
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    def count(self) -> int:
        """See :meth:`Source.count`."""
        return len(indexed.IndexedPairs(self._prefix))

    def rows(self) -> Iterator[Row]:
        """See :meth:`Source.rows`."""
        pairs = indexed.IndexedPairs(self._prefix)
        for index in range(len(pairs)):
            try:
                yield index + 1, pairs[index]
            except DataError as error:
                yield index + 1, malformed(str(error).removeprefix(f"{pairs.where(index)}: "))


class _Hasher:
    """The writable file that Arrow needs, around a digest."""

    closed = False

    def __init__(self, digest: Any) -> None:
        self._digest = digest

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _table_row(batch: Any, index: int) -> Any:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[index].as_py()
        except (ValueError, ArithmeticError, pa.ArrowException) as error:
            return malformed(f"{name}: cannot be read: {str(error)[:200]}")
    return row
