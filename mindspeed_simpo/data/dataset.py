"""The pairs of a run, from paths to checked token ids: sources, examples, conversations, token ids, report."""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt64
from transformers import PreTrainedTokenizerBase

from mindspeed_simpo.batch import TokenizedPair
from mindspeed_simpo.config.options import DataOptions
from mindspeed_simpo.data.cache import IDS, CachedTable, cache_folder
from mindspeed_simpo.data.encoding import PairEncoder
from mindspeed_simpo.data.examples import Examples, SourceExamples
from mindspeed_simpo.data.images import StoredImage
from mindspeed_simpo.data.mixture import Mixture
from mindspeed_simpo.data.parts import bounds_of, has_own_paths, mixture_of, readers_of, sources_of
from mindspeed_simpo.data.paths import Part, open_sources
from mindspeed_simpo.data.preparation import Preparation, tokenise_shares
from mindspeed_simpo.data.processor import ImageProcessor
from mindspeed_simpo.data.prompt_digests import prompt_digests
from mindspeed_simpo.data.report import DataReport, judge, make_report, without
from mindspeed_simpo.data.source import Source
from mindspeed_simpo.data.template import TemplateSettings
from mindspeed_simpo.data.tokenizer import tokenizer_digest
from mindspeed_simpo.errors import DataError

logger = logging.getLogger(__name__)

_FORMAT = 2
"""Part of every cache key: raise it when examples are encoded differently."""


class PairDataset:
    """Pairs in the order of the data, source by source, read from the memory-mapped cache."""

    def __init__(self, examples: Examples, report: DataReport, fingerprint: str, mixture: Mixture) -> None:
        self._examples, self._kept = examples, report.kept_rows
        self.fingerprint = fingerprint
        """Hex digest of the token ids of all examples and of the part that this data set is; equal for equal ids,
        whatever versions of the libraries made them."""
        self.report = report
        self.lengths = report.lengths
        """Tokens of prompt, chosen and rejected response of each pair, ``int32[pair, 3]``."""
        self.sources = examples.names
        """Names of the sources."""
        self.mixture = mixture
        """Pairs of each source, and those of an epoch."""

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> TokenizedPair:
        """The pair ``index``, from 0.

        Raises:
            IndexError: outside ``0 .. len - 1``.
        """
        row = int(self._kept[self._checked(index)])
        table = self._examples.table
        ids = {name: table.column(name)[row].values.to_numpy().tolist() for name in IDS}
        stored = tuple(StoredImage(**image) for image in table.column("images")[row].as_py() or ())
        return TokenizedPair(source=self._examples.where(row), images=stored, **ids)

    def source_of(self, index: int) -> int:
        """The source of the pair ``index``, as an index of ``sources``.

        Raises:
            IndexError: outside ``0 .. len - 1``.
        """
        return bisect_right(self.mixture.starts, self._checked(index)) - 1

    @property
    def has_images(self) -> bool:
        """Whether any example has images."""
        images = self._examples.table.column("images")
        return bool(images.null_count < len(images))

    @property
    def order_fingerprint(self) -> str:
        """``fingerprint``, and the mixture where it is not all pairs once: what the order of training depends on."""
        return self.fingerprint if self.mixture.is_whole else f"{self.fingerprint}: {self.mixture}"

    def prompt_digests(self, index: int = 0, shares: int = 1) -> UInt64[np.ndarray, " pair"]:
        """Digests of the prompts of one share of the pairs, in order, see :func:`prompt_digests`."""
        first, last = (len(self) * number // shares for number in (index, index + 1))
        return prompt_digests(self._examples.table, self._kept[first:last])

    def without_prompts(self, digests: UInt64[np.ndarray, " prompt"]) -> PairDataset:
        """The held-out pairs whose prompt has none of ``digests``; a log line says how many that leaves out.

        Raises:
            DataError: where no pair is left.
        """
        dropped = np.isin(self.prompt_digests(), digests)
        number = int(np.count_nonzero(dropped))
        text = f"eval_decontaminate: {number} of {len(self)} held-out pairs are left out: their prompts are in training"
        if not number:
            logger.info("eval_decontaminate: no prompt of the %d held-out pairs is in training", len(self))
            return self
        if number == len(self):
            raise DataError(f"{text}; no pair is left to evaluate: hold out other pairs, or leave the key out")
        logger.info("%s, first %s", text, self._examples.where(int(self._kept[dropped.argmax()])))
        fingerprint = hashlib.sha256(f"{self.fingerprint} {np.flatnonzero(dropped).tolist()}".encode()).hexdigest()
        return PairDataset(
            self._examples, without(self.report, dropped), fingerprint, self.mixture.held_out_without(dropped)
        )

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        return index


def has_eval_data(options: DataOptions) -> bool:
    """Whether the options name held-out pairs: ``eval_data_path``, or a second weight of a source's ``split``."""
    return options.has_held_out


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
    works = preparations_of(options, tokenizer, part, vocab_size, images=images)
    tables = [work.load_reusable() for work in works]
    missing = [work for work, table in zip(works, tables, strict=True) if table is None]
    if missing:
        tokenise_shares(missing, 0, 1, num_workers=options.num_workers, progress=progress)
    tables = [table or work.merge() for work, table in zip(works, tables, strict=True)]
    return dataset_of(options, part, works, tables)


def shared_prompts(
    held_out: PairDataset, training: PairDataset, index: int = 0, shares: int = 1
) -> UInt64[np.ndarray, " prompt"]:
    """Digests of the prompts of held-out pairs that pairs of one share of the training pairs have too."""
    wanted = np.unique(held_out.prompt_digests())
    return wanted[np.isin(wanted, training.prompt_digests(index, shares))]


def preparations_of(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    part: Part,
    vocab_size: int | None,
    files: Sequence[Sequence[Source]] | None = None,
    images: ImageProcessor | None = None,
) -> list[Preparation]:
    """The work that :func:`prepare_pairs` does for each source, for ranks that divide it; other arguments as there.

    Args:
        options: Of the data.
        tokenizer: Of the model.
        part: Which part.
        vocab_size: Of the model.
        files: :func:`files_of` the part, with surveys; ``None`` reads all of their content here.
        images: Processor of a model that takes images.

    Raises:
        SimpoError: as :func:`prepare_pairs`.
    """
    if files is None:
        files = files_of(options, part)
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
    folder = cache_folder(options.data_cache_dir) / "tokenised"
    works = []
    drops = options.data_errors == "drop"
    readers = readers_of(options, part, takes_images=images is not None)
    for (source, reader), its_files in zip(readers, files, strict=True):
        map_keys = options.map_keys if source.map_keys is None else source.map_keys
        key = _key(options, map_keys, tokenizer, its_files, vocab_size, images)
        works.append(Preparation(its_files, reader, encoder, folder / f"{key}.arrow", drops_unreadable=drops))
    return works


def files_of(options: DataOptions, part: Part) -> list[list[Source]]:
    """The files of each source of one part of the data.

    Raises:
        DataError: where there is no such data.
        ConfigError: where the options name no evaluation data, or ``map_keys`` is wrong.
    """
    split: Part = "eval" if has_own_paths(options, part) else "train"
    return [
        open_sources(source.path, split, reader.column_names, source.split_name)
        for source, reader in readers_of(options, part, takes_images=False)
    ]


def dataset_of(
    options: DataOptions, part: Part, works: Sequence[Preparation], cached: Sequence[CachedTable | None]
) -> PairDataset:
    """The data set of one part of the tokenised examples of each source.

    Raises:
        DataError: as :func:`prepare_pairs`, and where an entry of ``cached`` is ``None``.
    """
    tables = []
    for work, table in zip(works, cached, strict=True):
        if table is None:
            raise DataError(f"{work.path}: the tokenised data of this host are missing: run again")
        logger.info("tokenised data: %s", work.path)
        tables.append(table)
    sources = sources_of(options, part)
    bounds = bounds_of(options, part, [table.table.num_rows for table in tables])
    facts, of_sources = [], []
    for source, work, table, (first, last) in zip(sources, works, tables, bounds, strict=True):
        if first == last and part == "eval" and not has_own_paths(options, part):
            continue  # none of its examples are held out
        facts.append(f"{table.content} {table.table.num_rows} {first} {last}")
        of_sources.append(SourceExamples(str(source.name), work.sources, table.table.slice(first, last - first)))
    examples = Examples(of_sources)
    report = make_report(examples)
    judge(report, options)
    found = np.diff(np.searchsorted(report.kept_rows, examples.starts)).tolist()
    fingerprint = hashlib.sha256("; ".join(facts).encode()).hexdigest()
    left = [source for source in sources if source.name in examples.names]
    mixture = mixture_of(options, part, left, found)
    if not mixture.is_whole:
        numbers = zip(examples.names, mixture.used, mixture.found, strict=True)
        logger.info("pairs of an epoch: %s", ", ".join(f"{name} {used} (of {its})" for name, used, its in numbers))
    return PairDataset(examples, report, fingerprint, mixture)


def _key(
    options: DataOptions,
    map_keys: Mapping[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
    vocab_size: int | None,
    images: ImageProcessor | None,
) -> str:
    contents = [source.digest for source in sources]
    encoding: list[Any] = [map_keys, options.seq_length, options.prompt_limit, options.truncation, vocab_size]
    encoding += [options.chat_template_kwargs or {}, options.chat_template_date]
    if images is not None:  # paths of images begin at the folders of the files
        encoding += [images.digest, [str(source.folder and source.folder.absolute()) for source in sources]]
    facts = [_FORMAT, contents, tokenizer_digest(tokenizer), encoding]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
