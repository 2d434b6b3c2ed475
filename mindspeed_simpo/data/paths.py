"""Paths to sources: which files, folders, saved data sets and hub ids a configuration names, and the kind of each."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mindspeed_simpo.data import hub, indexed
from mindspeed_simpo.data.indexed import IndexedSource
from mindspeed_simpo.data.json_source import JsonSource
from mindspeed_simpo.data.problems import first_line, quoted
from mindspeed_simpo.data.source import Source
from mindspeed_simpo.data.table_source import ParquetSource, SplitSource
from mindspeed_simpo.errors import DataError

logger = logging.getLogger(__name__)

Part = Literal["train", "eval"]
_SUFFIXES = (".jsonl", ".json", ".parquet")
_SAVED_DATASET_MARKS = ("state.json", "dataset_dict.json")
_EVAL_SPLITS = ("validation", "test", "eval")


def open_sources(
    paths: str | Sequence[str], part: Part, column_names: Sequence[str], split: str | None = None
) -> list[Source]:
    """The sources that ``paths`` name, in order.

    Args:
        paths: Files (``.jsonl``, ``.json``, ``.parquet``), folders of such files (sorted by name; subfolders are not
            read), folders written by ``datasets``' ``save_to_disk``, prefixes of MindSpeed-LLM's tokenised pairs, or
            hub ids ``owner/name``, also ``owner/name:split``.
        part: Which split to take of a data set with several when none is named: ``train`` for training, the only one
            of ``validation``, ``test`` and ``eval`` for evaluation.
        column_names: Columns that are read of tables, where present.
        split: The split to take; every path must be a data set with splits.

    Raises:
        DataError: saying what was looked for.
    """
    names = [paths] if isinstance(paths, str) else paths
    return [source for name in names for source in _sources_of(name, part, column_names, split)]


def _sources_of(name: str, part: Part, column_names: Sequence[str], split: str | None) -> Iterator[Source]:
    path = Path(name).expanduser()
    exists = hub.exists(path)
    is_prefix = not exists and indexed.is_prefix(path)
    is_saved = exists and path.is_dir() and any((path / mark).is_file() for mark in _SAVED_DATASET_MARKS)
    if split is not None and (is_prefix or (exists and not is_saved)):
        raise DataError(
            f"{name}: split {split!r} names a split of a data set of the hub or of `save_to_disk`, and this is none; "
            "relative sizes of the train and eval parts would be such as 95,5"
        )
    if is_prefix:
        yield IndexedSource(path, name)
    elif not exists:
        yield _hub_source(name, path, part, column_names, split)
    elif is_saved:
        yield _saved_source(name, path, part, column_names, split)
    elif path.is_dir():
        for file in _files_of(path, name):
            yield _file_source(file, str(Path(name) / file.name), column_names)
    else:
        yield _file_source(path, name, column_names)


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


def _file_source(path: Path, name: str, column_names: Sequence[str]) -> Source:
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
    return ParquetSource(path, name, column_names) if suffix == ".parquet" else JsonSource(path, name)


def _saved_source(name: str, path: Path, part: Part, column_names: Sequence[str], split: str | None) -> Source:
    import datasets  # type: ignore[import-untyped]

    try:
        data: Any = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{name}: not a readable dataset folder: {first_line(error)}") from None
    if isinstance(data, datasets.DatasetDict):
        advice = f"name the folder of one split, such as {Path(name) / 'train'}, or give `split`"
        split = _choose_split(list(data), part, name, advice, split)
        return SplitSource(f"{name}[{split}]", data[split], column_names, path)
    if split is not None:
        raise DataError(f"{name}: split {split!r}, but this folder is one split of a data set")
    return SplitSource(name, data, column_names, path)


def _hub_source(name: str, path: Path, part: Part, column_names: Sequence[str], split: str | None) -> Source:
    import datasets

    hub_id, _, in_name = name.partition(":")
    if split is not None and in_name:
        raise DataError(f"{name}: names a split, and so does split {split!r}: give one of the two")
    split = split or in_name
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
        raise DataError(f"{looked_for}, and no dataset of the Hugging Face hub: {first_line(error)}") from None
    return SplitSource(f"{hub_id}:{split}", data, column_names)


def _choose_split(splits: list[str], part: Part, name: str, advice: str, wanted: str | None = None) -> str:
    if wanted is not None:
        if wanted not in splits:
            raise DataError(f"{name}: split {wanted!r}, but the dataset has the splits {quoted(splits)}")
        return wanted
    if len(splits) == 1:
        return splits[0]
    candidates = [split for split in (("train",) if part == "train" else _EVAL_SPLITS) if split in splits]
    if len(candidates) != 1:
        raise DataError(f"{name}: the dataset has the splits {quoted(splits)}: {advice}")
    return candidates[0]
