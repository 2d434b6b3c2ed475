"""Pairs and ranks whose loss is not finite: how they are found, and the file that records them when a run stops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from mindspeed_simpo.batch import PairBatch
from mindspeed_simpo.data.dataset import PairDataset
from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import TrainingError
from mindspeed_simpo.loss.scoring import ScoredBatch
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import fail_together, of_all_ranks
from mindspeed_simpo.training.session import Session, on_every_rank


@dataclass(frozen=True)
class RankReport:
    """The pairs of one rank that are recorded."""

    rank: int
    has_bad_loss: bool
    """Whether a loss of this rank is not finite."""
    examples: list[int]
    """Indices in the dataset, of the micro-batches with a loss that is not finite, else of all micro-batches."""


def is_finite(device: Device, step: int, *numbers: Tensor, logged: bool) -> bool:
    """Whether all numbers are finite; only a ``logged`` step forces a host synchronisation.

    Without one the result is True, and the device itself stops before it updates the parameters.

    Args:
        device: Of the numbers.
        step: For the message.
        numbers: Scalars.
        logged: Whether the step is logged.
    """
    finite = torch.stack([number.isfinite() for number in numbers]).all()
    if logged:
        return bool(finite)
    try:
        device.assert_async(
            finite,
            f"step {step}: the loss or the gradient norm is not finite; resume from the last checkpoint "
            "with a lower lr, and with log_interval: 1 to have the pairs of that step written",
        )
    except RuntimeError:  # on a CPU the assertion raises immediately
        return False
    return True


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


def stop(
    session: Session,
    root: Path,
    step: int,
    what: str,
    micro_batches: Sequence[PairBatch],
    scored: Sequence[ScoredBatch],
    data: PairDataset,
) -> NoReturn:
    """Write the pairs of a batch to a file in ``root`` and raise on all ranks.

    Args:
        session: The run's session.
        root: Output folder of the run.
        step: The step that stopped.
        what: What is not finite.
        micro_batches: See :func:`gather`.
        scored: See :func:`gather`.
        data: The dataset of the pairs.

    Raises:
        TrainingError: always, on every rank.
    """
    reports = gather(micro_batches, scored, session.groups)
    path = root / f"not_finite_step_{step:07d}.json"
    with fail_together(session.groups.control):
        if session.is_main:
            write_pairs(path, step, reports, data)
    ranks = ", ".join(str(report.rank) for report in reports)
    raise on_every_rank(
        TrainingError(
            f"step {step}: {what} is not finite on rank {ranks}; the pairs of that batch are in {path}. Nothing of "
            "this step was saved: resume from the last checkpoint with a lower lr, or without these pairs"
        )
    )
