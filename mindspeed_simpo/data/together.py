"""One part of the data, tokenised by all ranks of a run together."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import numpy as np
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from mindspeed_simpo.config.options import DataOptions
from mindspeed_simpo.data.cache import not_writable
from mindspeed_simpo.data.dataset import PairDataset, dataset_of, files_of, preparations_of, shared_prompts
from mindspeed_simpo.data.paths import Part
from mindspeed_simpo.data.preparation import tokenise_shares
from mindspeed_simpo.data.processor import ImageProcessor
from mindspeed_simpo.data.source import survey_share, take_surveys
from mindspeed_simpo.data.workers import cores
from mindspeed_simpo.parallel.collectives import fail_together, of_all_ranks


def prepare_together(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    part: Part,
    group: dist.ProcessGroup,
    *,
    vocab_size: int,
    images: ImageProcessor | None = None,
) -> PairDataset:
    """As :func:`~mindspeed_simpo.data.dataset.prepare_pairs`, with the work divided over ranks; a collective.

    The ranks of each host divide the reading of the data's content, whose digest is part of the cache file's name.
    Where all hosts share the cache folder, each rank tokenises its share of the shards; where each host has its own,
    the ranks of each host divide them. One rank makes the cache file and verifies it, the others of the host map it.

    Args:
        options: Of the data.
        tokenizer: Of the model.
        part: Which part.
        group: All ranks.
        vocab_size: Of the model.
        images: Processor of a model that takes images.

    Raises:
        SimpoError: on every rank, as :func:`~mindspeed_simpo.data.dataset.prepare_pairs`.
    """
    rank, ranks = group.rank(), group.size()
    local_rank, local_ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with fail_together(group):
        files = files_of(options, part)
        every = [file for its_files in files for file in its_files]
        own = survey_share(every, local_rank, local_ranks)
    of_host = of_all_ranks(own, group)[rank - local_rank :][:local_ranks]
    with fail_together(group):
        take_surveys(every, {key: survey for surveys in of_host for key, survey in surveys.items()})
        works = preparations_of(options, tokenizer, part, vocab_size, files, images)
        tables = [work.load_reusable() if local_rank == 0 else None for work in works]
        mark = _leave_mark(works[0].path)
    try:
        names = of_all_ranks(mark.name, group)
        shared = all(of_all_ranks(all(mark.with_name(name).exists() for name in names), group))
    finally:
        mark.unlink(missing_ok=True)
    index, count = (rank, ranks) if shared else (local_rank, local_ranks)
    found = of_all_ranks([table is not None for table in tables], group)
    missing = [
        not (any(rank_found) if shared else rank_found[rank - local_rank]) for rank_found in zip(*found, strict=True)
    ]
    with fail_together(group):
        left = [work for work, is_missing in zip(works, missing, strict=True) if is_missing]
        if left:
            workers = max(1, (options.num_workers or cores()) // local_ranks)
            tokenise_shares(left, index, count, num_workers=workers, progress=rank == 0)
    with fail_together(group):
        for number, work in enumerate(works):
            if missing[number] and index == 0:
                tables[number] = work.merge()
    with fail_together(group):
        verified = local_rank != 0
        tables = [table or work.load(verified=verified) for table, work in zip(tables, works, strict=True)]
        return dataset_of(options, part, works, tables)


def decontaminate_together(held_out: PairDataset, training: PairDataset, group: dist.ProcessGroup) -> PairDataset:
    """The held-out pairs whose prompt is that of no training pair, the same on every rank; a collective.

    Each rank reads its share of the training prompts.

    Args:
        held_out: The eval part.
        training: The train part.
        group: All ranks.

    Raises:
        DataError: on every rank, where no pair is left.
    """
    with fail_together(group):
        own = shared_prompts(held_out, training, group.rank(), group.size())
    shared = np.unique(np.concatenate(of_all_ranks(own, group)))
    with fail_together(group):
        return held_out.without_prompts(shared)


def _leave_mark(path: Path) -> Path:
    """An empty file beside ``path`` by which the ranks see whether they share the folder."""
    mark = path.with_name(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise not_writable(path, error) from None
    return mark
