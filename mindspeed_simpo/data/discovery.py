"""Finding the data that a configuration names: files, folders, saved datasets and the Hugging Face hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from mindspeed_simpo.data import hub, indexed
from mindspeed_simpo.data.sources import IndexedSource, JsonSource, Source, TableSource
from mindspeed_simpo.data.turns import printable, quoted
from mindspeed_simpo.errors import DataError

logger = logging.getLogger(__name__)

Part = Literal["train", "eval"]
_SUFFIXES = (".jsonl", ".json", ".parquet")
_SAVED_DATASET_MARKS = ("state.json", "dataset_dict.json")
_EVAL_SPLITS = ("validation", "test", "eval")
_BATCH_ROWS = 1000


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
