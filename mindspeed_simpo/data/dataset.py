"""The pairs of a run: tokenised, checked, cached and counted."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from mindspeed_simpo.batch import TokenizedPair
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.data.cache import cache_folder, read_table, write_table
from mindspeed_simpo.data.discovery import Part, open_sources
from mindspeed_simpo.data.encoding import PairEncoder
from mindspeed_simpo.data.report import DataReport, judge, make_report
from mindspeed_simpo.data.rows import RowReader
from mindspeed_simpo.data.sources import Source
from mindspeed_simpo.data.tokenizer import tokenizer_digest
from mindspeed_simpo.data.turns import RowError
from mindspeed_simpo.data.workers import PlacedRow, encode_rows
from mindspeed_simpo.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Part of every cache key: raise it when rows are encoded differently."""


class PairDataset:
    """Pairs in row order, read from the memory-mapped cache."""

    def __init__(self, table: Any, sources: Sequence[Source], fingerprint: str, report: DataReport) -> None:
        kept = np.flatnonzero(table.column("kind").is_null().to_numpy())
        self._table = table
        self._kept = kept
        self._sources = list(sources)
        self.fingerprint = fingerprint
        """Hex digest of content, tokenizer and options; the same wherever the data lies."""
        self.report = report
        self.lengths = report.lengths
        """Tokens of prompt, chosen and rejected response of each pair, ``int64[pair, 3]``."""

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> TokenizedPair:
        """The pair ``index``, from 0.

        Raises:
            IndexError: outside ``0 .. len - 1``.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        row = int(self._kept[index])
        prompt, chosen, rejected = (
            self._table.column(name)[row].values.to_numpy().tolist()
            for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        source, line = (self._table.column(name)[row].as_py() for name in ("source", "line"))
        return TokenizedPair(prompt, chosen, rejected, self._sources[source].where(line))


def has_eval_data(config: Config) -> bool:
    """Whether the configuration names held-out pairs: ``eval_data_path``, or a second weight of ``split``."""
    return config.eval_data_path is not None or _weights(config.split)[1] > 0


def prepare_pairs(
    config: Config, tokenizer: PreTrainedTokenizerBase, part: Literal["train", "eval"], *, progress: bool
) -> PairDataset:
    """Read, check and tokenise one part of the data, or take it from the cache.

    ``train`` is the first part of ``split`` of the rows of ``data_path``, in row order; ``eval`` is all of
    ``eval_data_path``, else the second part. Call it on one rank of each node first and on the others when that one is
    done: they then find the cache. Calls at the same time are safe, and only repeat the work.

    Args:
        config: The data options.
        tokenizer: From :func:`~mindspeed_simpo.data.tokenizer.load_tokenizer`.
        part: Which part.
        progress: Show a progress bar on stderr.

    Raises:
        DataError: where data cannot be read; where rows cannot be used and ``data_errors`` is ``fail``; where pairs are
            too long and ``truncation`` is ``error``; where no pair is left.
        ModelError: where the chat template cannot serve.
        ConfigError: where the configuration has no evaluation data, or ``map_keys`` is wrong.
    """
    if part == "eval" and not has_eval_data(config):
        raise ConfigError("no evaluation data: set eval_data_path, or give split a second weight, such as 95,5")
    whole = part == "eval" and config.eval_data_path is not None
    reader = RowReader(config.map_keys)
    sources = open_sources(
        config.eval_data_path if whole and config.eval_data_path is not None else config.data_path,
        part if whole else "train",
        reader.column_names,
    )
    encoder = PairEncoder(
        tokenizer, seq_length=config.seq_length, prompt_limit=config.prompt_limit, truncation=config.truncation
    )
    key = _key(config, tokenizer, sources)
    table = _load_or_build(config, key, sources, reader, encoder, progress=progress)
    first, last = (0, table.num_rows) if whole else _bounds(config.split, part, table.num_rows)
    if first == last:
        raise DataError(f"split {config.split} of {table.num_rows} rows leaves no row for the {part} part")
    table = table.slice(first, last - first)
    report = make_report(table, sources)
    judge(report, config)
    fingerprint = hashlib.sha256(f"{key} {first} {last}".encode()).hexdigest()
    return PairDataset(table, sources, fingerprint, report)


def _key(config: Config, tokenizer: PreTrainedTokenizerBase, sources: Sequence[Source]) -> str:
    try:
        contents = [source.digest() for source in sources]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot read the data: {error.strerror}") from None
    options = [config.map_keys, config.seq_length, config.prompt_limit, config.truncation]
    facts = [_FORMAT, contents, tokenizer_digest(tokenizer), options]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _load_or_build(
    config: Config, key: str, sources: Sequence[Source], reader: RowReader, encoder: PairEncoder, *, progress: bool
) -> Any:
    path = cache_folder(config.data_cache_dir) / "tokenised" / f"{key}.arrow"
    table = read_table(path)
    if table is not None:
        logger.info("tokenised data from the cache %s", path)
        return table
    # Counted only to be shown: it reads JSON arrays once more.
    total = sum(source.count() for source in sources) if progress else None
    results = encode_rows(_rows(sources, reader), encoder, num_workers=config.num_workers, total=total)
    write_table(path, results)
    table = read_table(path)
    if table is None:
        raise DataError(f"{path}: the tokenised data cannot be read back; set data_cache_dir to another folder")
    return table


def _rows(sources: Sequence[Source], reader: RowReader) -> Iterator[PlacedRow]:
    for index, source in enumerate(sources):
        try:
            for line, value in source.rows():
                yield PlacedRow(index, line, _read(reader, value))
        except OSError as error:
            raise DataError(f"{source.name}: cannot read the data: {error.strerror or error}") from None


def _read(reader: RowReader, value: Any) -> Any:
    if isinstance(value, (RowError, TokenizedPair)):
        return value
    try:
        return reader.read(value)
    except RowError as error:
        return error


def _weights(split: str) -> list[float]:
    weights = [float(part) for part in split.split(",")]
    return [*weights, 0.0, 0.0][:3]


def _bounds(split: str, part: Part, rows: int) -> tuple[int, int]:
    weights = _weights(split)
    first = round(rows * weights[0] / sum(weights))
    if part == "train":
        return 0, first
    return first, round(rows * (weights[0] + weights[1]) / sum(weights))
