"""Which pairs and ranks a loss that is not finite comes from, for the file that a stopped run leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from mindspeed_simpo.batch import PairBatch
from mindspeed_simpo.data.dataset import PairDataset
from mindspeed_simpo.errors import TrainingError
from mindspeed_simpo.loss.scoring import ScoredBatch
from mindspeed_simpo.parallel import Groups


@dataclass(frozen=True)
class RankReport:
    """What one rank says of the batch."""

    rank: int
    has_bad_loss: bool
    rows: list[int]
    """Rows of the dataset: those of micro-batches with a bad loss, or all where no loss is bad but the gradient is."""


def gather(micro_batches: Sequence[PairBatch], scored: Sequence[ScoredBatch], groups: Groups) -> list[RankReport]:
    """The reports of the ranks whose loss is not finite, else of all that have pairs; the same on every rank.

    A collective.
    """
    bad = [item.batch for item in scored if not bool(torch.isfinite(item.output.loss).all())]
    rows = [row for batch in bad or micro_batches for row in batch.pair_ids.tolist() if row >= 0]
    mine = RankReport(groups.world.rank(), has_bad_loss=bool(bad), rows=rows if groups.contributes_loss else [])
    reports: list[RankReport | None] = [None] * groups.world.size()
    dist.all_gather_object(reports, mine, group=groups.world)
    found = [report for report in reports if report is not None]
    return [report for report in found if report.has_bad_loss] or [report for report in found if report.rows]


def write_pairs(path: Path, step: int, reports: Sequence[RankReport], data: PairDataset) -> None:
    """Write the pairs' token ids and where they come from as JSON.

    Raises:
        TrainingError: where the file cannot be written.
    """
    pairs = [
        {"rank": report.rank, "row": row, **vars(data[row])} for report in reports for row in sorted(set(report.rows))
    ]
    try:
        path.write_text(json.dumps({"step": step, "pairs": pairs}, ensure_ascii=False, indent=1), encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"step {step}: not finite, and {path} cannot be written: {error}") from None
