"""Arrow tables as sources: Parquet files, and splits that the ``datasets`` library opened."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from mindspeed_simpo.data.foreign import refuse_foreign
from mindspeed_simpo.data.problems import first_line, malformed, quoted
from mindspeed_simpo.data.source import Example, Source, Survey
from mindspeed_simpo.errors import DataError

_BATCH_ROWS = 1000
_ROWS_WITH_BYTES = 64
"""Rows that are held together where they have whole image files in them."""


class TableSource(Source):
    """An Arrow table, of which only the wanted columns are read; places are row numbers, counted from 1.

    Args:
        name: For messages.
        schema: Of the table.
        num_rows: Of the table.
        column_names: Columns that are read, where the table has them.

    Raises:
        DataError: where the table has none of the columns, or one of them twice.
    """

    place = "{name}:row {number}"

    def __init__(self, name: str, schema: Any, num_rows: int, column_names: Sequence[str]) -> None:
        super().__init__(name)
        self._num_rows = num_rows
        self._columns = _present_columns(schema, name, column_names)
        if any(_holds_bytes(schema.field(column).type) for column in self._columns):
            self.block_examples = _ROWS_WITH_BYTES
        self._batch_rows = min(_BATCH_ROWS, self.block_examples)

    @abstractmethod
    def _batches(self, after: int = 0) -> Iterator[Any]:
        """Record batches of the columns that are read, in order, without the first ``after`` rows."""

    def survey(self, piece: int) -> Survey:  # noqa: ARG002
        """See :meth:`Source.survey`."""
        digest = hashlib.sha256()
        writer = None
        for batch in self._batches():
            if writer is None:
                sink = pa.PythonFile(_Hasher(digest), mode="w")
                writer = pa.ipc.new_stream(sink, batch.schema.remove_metadata())
            writer.write_batch(batch.replace_schema_metadata(None))
        if writer is not None:
            writer.close()
        return Survey(digest.hexdigest())

    @property
    def places(self) -> int | None:
        """See :attr:`Source.places`."""
        return self._num_rows

    def raw_examples(self, after: int = 0) -> Iterator[Example]:
        """See :meth:`Source.raw_examples`."""
        if not self._num_rows:
            raise DataError(f"{self.name}: the table has no rows")
        number = after
        for batch in self._batches(after):
            for index in range(batch.num_rows):
                number += 1
                yield number, _decoded(batch, index)


class ParquetSource(TableSource):
    """A ``.parquet`` file.

    Args:
        path: A file that can be opened.
        name: For messages.
        column_names: Columns that are read, where the file has them.

    Raises:
        DataError: where the file is empty or no Parquet file, or its columns do not serve.
    """

    def __init__(self, path: Path, name: str, column_names: Sequence[str]) -> None:
        if not path.stat().st_size:
            raise DataError(f"{name}: the file is empty; expected a Parquet table")
        with path.open("rb") as head:
            start = head.read(64)
        if not start.startswith(b"PAR1"):
            refuse_foreign(start, name)
        try:
            with pq.ParquetFile(path) as file:
                schema, num_rows = file.schema_arrow, file.metadata.num_rows
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{name}: not a readable Parquet file: {first_line(error)}") from None
        super().__init__(name, schema, num_rows, column_names)
        self._path = path
        self.folder = path.parent

    def _batches(self, after: int = 0) -> Iterator[Any]:
        try:
            with pq.ParquetFile(self._path) as file:
                group = 0
                while group < file.num_row_groups and file.metadata.row_group(group).num_rows <= after:
                    after -= file.metadata.row_group(group).num_rows
                    group += 1
                groups = range(group, file.num_row_groups)
                for batch in file.iter_batches(batch_size=self._batch_rows, row_groups=groups, columns=self._columns):
                    yield batch.slice(min(after, batch.num_rows))
                    after = max(0, after - batch.num_rows)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{self.name}: the Parquet file is damaged: {first_line(error)}") from None


class SplitSource(TableSource):
    """One split of a data set.

    Args:
        name: For messages.
        data: ``datasets.Dataset``.
        column_names: Columns that are read, where the split has them.
        folder: See :attr:`~mindspeed_simpo.data.source.Source.folder`.

    Raises:
        DataError: where the columns of the split do not serve.
    """

    def __init__(self, name: str, data: Any, column_names: Sequence[str], folder: Path | None = None) -> None:
        self.folder = folder
        self._table = (data if data._indices is None else data.flatten_indices()).data.table
        super().__init__(name, self._table.schema, self._table.num_rows, column_names)

    def _batches(self, after: int = 0) -> Iterator[Any]:
        yield from self._table.select(self._columns).slice(after).to_batches(max_chunksize=self._batch_rows)


def _holds_bytes(kind: Any) -> bool:
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return True
    return any(_holds_bytes(kind.field(index).type) for index in range(kind.num_fields))


def _present_columns(schema: Any, name: str, wanted: Sequence[str]) -> list[str]:
    present = [column for column in wanted if column in schema.names]
    twice = [column for column in present if schema.names.count(column) > 1]
    if twice:
        raise DataError(f"{name}: the column {quoted(twice)} appears twice")
    if not present:
        raise DataError(
            f"{name}: no column of a preference row; the table has {quoted(schema.names)} "
            f"and rows are recognised by {quoted(wanted)} (`map_keys` tells other names)"
        )
    return present


def _decoded(batch: Any, index: int) -> Any:
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns[name] = column[index].as_py()
        except (ValueError, ArithmeticError, pa.ArrowException) as error:
            return malformed(f"{name}: cannot be read: {str(error)[:200]}")
    return columns


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
