"""The pairs of a run, from paths to checked token ids: sources, examples, conversations, token ids, report."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from mindspeed_simpo.batch import TokenizedPair
from mindspeed_simpo.config.options import DataOptions
from mindspeed_simpo.data.cache import IDS, CachedTable, cache_folder
from mindspeed_simpo.data.conversations import ExampleReader
from mindspeed_simpo.data.encoding import PairEncoder
from mindspeed_simpo.data.images import StoredImage
from mindspeed_simpo.data.paths import Part, open_sources
from mindspeed_simpo.data.preparation import Preparation
from mindspeed_simpo.data.processor import ImageProcessor
from mindspeed_simpo.data.report import DataReport, judge, make_report
from mindspeed_simpo.data.source import Source
from mindspeed_simpo.data.template import TemplateSettings
from mindspeed_simpo.data.tokenizer import tokenizer_digest
from mindspeed_simpo.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_FORMAT = 2
"""Part of every cache key: raise it when examples are encoded differently."""


class PairDataset:
    """Pairs in the order of the data, read from the memory-mapped cache."""

    def __init__(self, table: Any, sources: Sequence[Source], fingerprint: str, report: DataReport) -> None:
        self._table = table
        self._kept = report.kept_rows
        self._sources = list(sources)
        self.fingerprint = fingerprint
        """Hex digest of the token ids of all examples and of the part that this data set is; equal for equal ids,
        whatever versions of the libraries made them."""
        self.report = report
        self.lengths = report.lengths
        """Tokens of prompt, chosen and rejected response of each pair, ``int32[pair, 3]``."""

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
        ids = {name: self._table.column(name)[row].values.to_numpy().tolist() for name in IDS}
        source, number, images = (self._table.column(name)[row].as_py() for name in ("source", "line", "images"))
        stored = tuple(StoredImage(**image) for image in images or ())
        return TokenizedPair(source=self._sources[source].where(number), images=stored, **ids)

    @property
    def has_images(self) -> bool:
        """Whether any example has images."""
        return bool(self._table.column("images").null_count < self._table.num_rows)


def has_eval_data(options: DataOptions) -> bool:
    """Whether the options name held-out pairs: ``eval_data_path``, or a second weight of ``split``."""
    return options.eval_data_path is not None or _weights(options.split)[1] > 0


def prepare_pairs(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    part: Part,
    *,
    progress: bool,
    vocab_size: int | None = None,
    images: ImageProcessor | None = None,
) -> PairDataset:
    """Read, check and tokenise one part of the data, or take its token ids from the cache.

    ``train`` is the first part of ``split`` of the examples of ``data_path``, in their order; ``eval`` is all of
    ``eval_data_path``, else the second part. Calls at the same time are safe, and only repeat the work;
    :mod:`~mindspeed_simpo.data.together` divides it over ranks.

    Args:
        options: Of the data.
        tokenizer: From :func:`~mindspeed_simpo.data.tokenizer.load_tokenizer`.
        part: Which part.
        progress: Show a progress bar on stderr.
        vocab_size: Of the model; examples with token ids beyond it are malformed. ``None`` checks nothing.
        images: Processor of a model that takes images; ``None`` refuses examples with images.

    Raises:
        DataError: where data cannot be read; where examples cannot be used and ``data_errors`` is ``fail``; where pairs
            are too long and ``truncation`` is ``error``; where no pair is left.
        ModelError: where the chat template cannot serve.
        ConfigError: where the options name no evaluation data, or ``map_keys`` is wrong.
    """
    work = preparation_of(options, tokenizer, part, vocab_size, images=images)
    table = work.load_reusable()
    if table is None:
        work.tokenise_share(0, 1, num_workers=options.num_workers, progress=progress)
        table = work.merge()
    return dataset_of(options, part, work, table)


def preparation_of(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    part: Part,
    vocab_size: int | None,
    sources: Sequence[Source] | None = None,
    images: ImageProcessor | None = None,
) -> Preparation:
    """The work that :func:`prepare_pairs` does, for ranks that divide it; other arguments and errors as there.

    Args:
        options: Of the data.
        tokenizer: Of the model.
        part: Which part.
        vocab_size: Of the model.
        sources: :func:`sources_of` the part, with surveys; ``None`` reads all of their content here.
        images: Processor of a model that takes images.
    """
    if sources is None:
        sources = sources_of(options, part)
    if vocab_size is not None and vocab_size > max(tokenizer.get_vocab().values()):
        vocab_size = None  # the model has every token: nothing to check, and the key does not depend on the model
    encoder = PairEncoder(
        tokenizer,
        seq_length=options.seq_length,
        prompt_limit=options.prompt_limit,
        truncation=options.truncation,
        vocab_size=vocab_size,
        template=TemplateSettings.of(options),
        images=images,
    )
    key = _key(options, tokenizer, sources, vocab_size, images)
    folder = cache_folder(options.data_cache_dir) / "tokenised"
    reader = ExampleReader(options.map_keys, takes_images=images is not None)
    return Preparation(
        sources, reader, encoder, folder / f"{key}.arrow", drops_unreadable=options.data_errors == "drop"
    )


def sources_of(options: DataOptions, part: Part) -> list[Source]:
    """The sources of one part of the data.

    Raises:
        DataError: where there is no such data.
        ConfigError: where the options name no evaluation data, or ``map_keys`` is wrong.
    """
    if part == "eval" and not has_eval_data(options):
        raise ConfigError("no evaluation data: set eval_data_path, or give split a second weight, such as 95,5")
    columns = ExampleReader(options.map_keys).column_names
    if _has_own_paths(options, part):
        return open_sources(options.eval_data_path or [], "eval", columns)
    return open_sources(_training_paths(options), "train", columns)


def dataset_of(options: DataOptions, part: Part, work: Preparation, cached: CachedTable | None) -> PairDataset:
    """The data set of one part of tokenised examples.

    Raises:
        DataError: as :func:`prepare_pairs`, and where ``cached`` is ``None``.
    """
    if cached is None:
        raise DataError(f"{work.path}: the tokenised data of this host are missing: run again")
    logger.info("tokenised data: %s", work.path)
    table, rows = cached.table, cached.table.num_rows
    first, last = (0, rows) if _has_own_paths(options, part) else _bounds(options.split, part, rows)
    if first == last:
        raise DataError(f"split {options.split} of {rows} rows leaves no row for the {part} part")
    table = table.slice(first, last - first)
    report = make_report(table, work.sources)
    judge(report, options)
    fingerprint = hashlib.sha256(f"{cached.content} {rows} {first} {last}".encode()).hexdigest()
    return PairDataset(table, work.sources, fingerprint, report)


def _has_own_paths(options: DataOptions, part: Part) -> bool:
    return part == "eval" and options.eval_data_path is not None


def _training_paths(options: DataOptions) -> str | list[str]:
    if options.data_path is None:
        raise ConfigError("no training data: set data_path")
    return options.data_path


def _key(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
    vocab_size: int | None,
    images: ImageProcessor | None,
) -> str:
    contents = [source.digest for source in sources]
    encoding: list[Any] = [options.map_keys, options.seq_length, options.prompt_limit, options.truncation, vocab_size]
    encoding += [options.chat_template_kwargs or {}, options.chat_template_date]
    if images is not None:  # paths of images begin at the folders of the files
        encoding += [images.digest, [str(source.folder and source.folder.absolute()) for source in sources]]
    facts = [_FORMAT, contents, tokenizer_digest(tokenizer), encoding]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _weights(split: str) -> list[float]:
    weights = [float(part) for part in split.split(",")]
    return [*weights, 0.0, 0.0][:3]


def _bounds(split: str, part: Part, examples: int) -> tuple[int, int]:
    """First example of a part and the one after its last."""
    weights = _weights(split)
    first = round(examples * weights[0] / sum(weights))
    if part == "train":
        return 0, first
    return first, round(examples * (weights[0] + weights[1]) / sum(weights))
