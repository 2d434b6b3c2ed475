"""Pairs and ranks whose loss is not finite, and the file that records them when a run stops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mindspeed_simpo.batch import PairBatch
from mindspeed_simpo.data.dataset import PairDataset
from mindspeed_simpo.errors import TrainingError
from mindspeed_simpo.loss.scoring import ScoredBatch
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import of_all_ranks


@dataclass(frozen=True)
class RankReport:
    """The pairs of one rank that are recorded."""

    rank: int
    has_bad_loss: bool
    """Whether a loss of this rank is not finite."""
    examples: list[int]
    """Indices in the dataset, of the micro-batches with a loss that is not finite, else of all micro-batches."""


def gather(micro_batches: Sequence[PairBatch], scored: Sequence[ScoredBatch], groups: Groups) -> list[RankReport]:
    """The reports of the ranks with a loss that is not finite, else of all ranks with pairs; a collective of the world.

    Args:
        micro_batches: This rank's micro-batches of the global batch.
        scored: Their records; empty except on the last pipeline rank.
        groups: Process groups of this rank.

    Returns:
        The same reports on every rank.
    """
    bad = [item.batch for item in scored if not bool(torch.isfinite(item.output.loss).all())]
    examples = [index for batch in bad or micro_batches for index in batch.pair_ids.tolist() if index >= 0]
    listed = examples if groups.contributes_loss else []
    mine = RankReport(groups.world.rank(), has_bad_loss=bool(bad), examples=listed)
    found = of_all_ranks(mine, groups.control)
    return [report for report in found if report.has_bad_loss] or [report for report in found if report.examples]


def write_pairs(path: Path, step: int, reports: Sequence[RankReport], data: PairDataset) -> None:
    """Write the token ids and the source of each reported pair as JSON.

    Args:
        path: File to write.
        step: The step that stopped.
        reports: From :func:`gather`.
        data: The dataset of the pairs.

    Raises:
        TrainingError: where the file cannot be written.
    """
    pairs = [
        {"rank": report.rank, "row": index, **vars(data[index])}
        for report in reports
        for index in sorted(set(report.examples))
    ]
    try:
        path.write_text(json.dumps({"step": step, "pairs": pairs}, ensure_ascii=False, indent=1), encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"step {step}: not finite, and {path} cannot be written: {error}") from None
