"""Where rows come from: files, folders, saved datasets and the Hugging Face hub, each row with its place."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from mindspeed_simpo.data import hub, indexed
from mindspeed_simpo.data.json_rows import Row, read_json, read_jsonl
from mindspeed_simpo.data.turns import malformed, printable, quoted
from mindspeed_simpo.errors import DataError

logger = logging.getLogger(__name__)

Part = Literal["train", "eval"]
_SUFFIXES = (".jsonl", ".json", ".parquet")
_SAVED_DATASET_MARKS = ("state.json", "dataset_dict.json")
_EVAL_SPLITS = ("validation", "test", "eval")
_BATCH_ROWS = 1000


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


def open_sources(paths: str | Sequence[str], part: Part, column_names: Sequence[str]) -> list[Source]:
    """Find the data that ``paths`` name, in order.

    Args:
        paths: Files (``.jsonl``, ``.json``, ``.parquet``), folders of such files (sorted by name, not deeper), folders
            written by ``datasets``' ``save_to_disk``, prefixes of MindSpeed-LLM's tokenised pairs, or hub ids
            ``owner/name``, also ``owner/name:split``.
        part: Which split to take of a dataset with several when none is named: ``train`` for training, the only one of
            ``validation``, ``test`` and ``eval`` for evaluation.
        column_names: Columns that are read of tables, where present.

    Raises:
        DataError: saying what was looked for.
    """
    sources: list[Source] = []
    for name in [paths] if isinstance(paths, str) else paths:
        path = Path(name).expanduser()
        if not hub.exists(path) and indexed.is_prefix(path):
            sources.append(IndexedSource(path, name))
        elif not hub.exists(path):
            sources.append(_from_hub(name, path, part, column_names))
        elif path.is_dir() and any((path / mark).is_file() for mark in _SAVED_DATASET_MARKS):
            sources.append(_from_saved(name, path, part, column_names))
        elif path.is_dir():
            sources.extend(
                _from_file(file, str(Path(name) / file.name), column_names) for file in _files_of(path, name)
            )
        else:
            sources.append(_from_file(path, name, column_names))
    return sources


def _files_of(folder: Path, name: str) -> list[Path]:
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{name}: cannot list the folder: {error.strerror}") from None
    files = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in _SUFFIXES]
    others = [entry.name + ("/" if entry.is_dir() else "") for entry in entries if entry not in files]
    if not files:
        raise DataError(
            f"{name}: the folder holds no {', '.join(_SUFFIXES)} file and is no dataset of `save_to_disk`; "
            f"it holds {quoted(others) or 'nothing'}"
        )
    if others:
        logger.info("%s: reading %s; not data files: %s", name, quoted(f.name for f in files), quoted(others))
    return files


def _from_file(path: Path, name: str, column_names: Sequence[str]) -> Source:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise DataError(f"{name}: unknown kind of file; expected {', '.join(_SUFFIXES)} or a folder")
    if not path.is_file():
        raise DataError(
            f"{name}: not a regular file; rows are read more than once, so that a pipe or device cannot serve"
        )
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise DataError(f"{name}: cannot read the file: {error.strerror}") from None
    if suffix != ".parquet":
        return JsonSource(path, name)
    return _from_parquet(path, name, column_names)


def _from_parquet(path: Path, name: str, column_names: Sequence[str]) -> Source:
    if not path.stat().st_size:
        raise DataError(f"{name}: the file is empty; expected a Parquet table")
    try:
        with pq.ParquetFile(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{name}: not a readable Parquet file: {_first_line(error)}") from None

    def batches(columns: list[str]) -> Iterator[Any]:
        try:
            with pq.ParquetFile(path) as file:
                yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=columns)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{name}: the Parquet file is damaged: {_first_line(error)}") from None

    return TableSource(name, num_rows, _columns_of(schema, name, column_names), batches)


def _columns_of(schema: Any, name: str, wanted: Sequence[str]) -> list[str]:
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


def _from_saved(name: str, path: Path, part: Part, column_names: Sequence[str]) -> Source:
    import datasets  # type: ignore[import-untyped]

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{name}: not a readable dataset folder: {_first_line(error)}") from None
    if isinstance(data, datasets.DatasetDict):
        split = _choose_split(list(data), part, name, f"name the folder of one split, such as {Path(name) / 'train'}")
        return _from_dataset(f"{name}[{split}]", data[split], column_names)
    return _from_dataset(name, data, column_names)


def _from_hub(name: str, path: Path, part: Part, column_names: Sequence[str]) -> Source:
    import datasets

    hub_id, _, split = name.partition(":")
    looked_for = f"{name}: no such file or folder (looked for {path.absolute()})"
    if path.suffix.lower() in _SUFFIXES or not hub.may_be_hub_id(hub_id):
        raise DataError(f"{looked_for}; a hub id would be `owner/name` or `owner/name:split`")
    if reason := hub.unreachable():
        raise DataError(f"{looked_for}, and no dataset of the Hugging Face hub: {reason}")
    try:
        splits = [split] if split else datasets.get_dataset_split_names(hub_id)
        split = split or _choose_split(splits, part, name, f"write {hub_id}:SPLIT")
        data = datasets.load_dataset(hub_id, split=split)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{looked_for}, and no dataset of the Hugging Face hub: {_first_line(error)}") from None
    return _from_dataset(f"{hub_id}:{split}", data, column_names)


def _choose_split(splits: list[str], part: Part, name: str, advice: str) -> str:
    if len(splits) == 1:
        return splits[0]
    candidates = [split for split in (("train",) if part == "train" else _EVAL_SPLITS) if split in splits]
    if len(candidates) != 1:
        raise DataError(f"{name}: the dataset has the splits {quoted(splits)}: {advice}")
    return candidates[0]


def _from_dataset(name: str, data: Any, column_names: Sequence[str]) -> Source:
    table = (data if data._indices is None else data.flatten_indices()).data.table

    def batches(columns: list[str]) -> Iterator[Any]:
        yield from table.select(columns).to_batches(max_chunksize=_BATCH_ROWS)

    return TableSource(name, table.num_rows, _columns_of(table.schema, name, column_names), batches)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return printable(lines[0][:300]) if lines else type(error).__name__
