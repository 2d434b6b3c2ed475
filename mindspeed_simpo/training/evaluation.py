"""Evaluation on held-out pairs."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.data.dataset import PairDataset
from mindspeed_simpo.data.loader import PairLoader
from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import TrainingError
from mindspeed_simpo.parallel.collectives import fail_together
from mindspeed_simpo.training import checkpoint
from mindspeed_simpo.training.base_model import check_base
from mindspeed_simpo.training.reference_pass import UsedPairs, configured_tables
from mindspeed_simpo.training.resume import check_adapters
from mindspeed_simpo.training.schedule.runner import PairSchedule
from mindspeed_simpo.training.session import Session, on_every_rank, open_session


def evaluate(config: Config, device: Device) -> dict[str, float]:
    """Evaluate all held-out pairs with the starting weights, or with those of ``load``.

    Args:
        config: A validated configuration.
        device: The opened device of this rank.

    Returns:
        Mean over pairs of every metric, the same on every rank.

    Raises:
        SimpoError: on every rank.
    """
    with open_session(config, device) as session:
        data = session.prepare("eval")
        loader = session.loader(data)
        [table] = configured_tables(session, session.config, [UsedPairs(data, loader.eval_pairs())])
        load_configured(session)
        schedule = session.schedule(session.backend.for_scoring(), table)
        values = mean_metrics(session, schedule, data, loader, None)
    if not math.isfinite(values["loss"]):
        weights = config.load or config.model_name_or_path
        raise on_every_rank(
            TrainingError(f"the loss of the held-out pairs is not finite: see the weights of {weights}")
        )
    return values


def load_configured(session: Session) -> tuple[Path, checkpoint.TrainingState] | None:
    """Load the checkpoint that ``load`` names into the session's model, which keeps its starting weights without one.

    A collective of the world. The starting weights may be the reference, whose sums must have been computed before.

    Returns:
        Folder and state of the checkpoint.

    Raises:
        SimpoError: on every rank, where the checkpoint cannot be used.
    """
    config, groups = session.config, session.groups
    if config.load is None:
        return None
    load = config.output_dir if config.load == "auto" else config.load
    folder, state = checkpoint.find(load, groups.control)
    with fail_together(groups.control):
        check_adapters(folder, state, config)
        check_base(folder, state.base, session.base)
    checkpoint.load(folder, session.models, None, groups, session.device)
    session.running.load(state.running)
    return folder, state


def mean_metrics(
    session: Session, schedule: PairSchedule, data: PairDataset, loader: PairLoader, max_batches: int | None
) -> dict[str, float]:
    """Mean over pairs of every metric; a collective of the world.

    Where the data have several sources, the metrics of each stand beside those of all as ``source/NAME/METRIC``; a
    source without a pair among the evaluated ones has none.

    Args:
        session: The run's session.
        schedule: Evaluates the micro-batches.
        data: The held-out pairs.
        loader: Of ``data``.
        max_batches: Number of global batches; None for all.
    """
    sums = session.metric_sums
    starts = torch.tensor(data.mixture.starts, device=session.device.torch_device)
    total, of_sources = sums.local([]), sums.local_by_source([], starts)
    for micro_batches in loader.eval_steps(max_batches):
        scored = schedule.forward(micro_batches)
        total += sums.local(scored)
        if len(data.sources) > 1:
            of_sources += sums.local_by_source(scored, starts)
    whole, *rows = sums.reduce(torch.cat([total[None], of_sources]))
    values = sums.totals(whole).means
    if len(data.sources) > 1:
        for name, row in zip(data.sources, rows, strict=True):
            values |= {f"source/{name}/{metric}": value for metric, value in sums.totals(row).means.items()}
    return values
