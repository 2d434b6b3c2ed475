"""Evaluation on held-out pairs."""

from __future__ import annotations

import math
from pathlib import Path

from mindspeed_simpo.config.config import Config
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
        values = mean_metrics(session, schedule, loader, None)
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
    session: Session, schedule: PairSchedule, loader: PairLoader, max_batches: int | None
) -> dict[str, float]:
    """Mean over pairs of every metric; a collective of the world.

    Args:
        session: The run's session.
        schedule: Evaluates the micro-batches.
        loader: The held-out pairs.
        max_batches: Number of global batches; None for all.
    """
    total = session.metric_sums.local([])
    for micro_batches in loader.eval_steps(max_batches):
        total += session.metric_sums.local(schedule.forward(micro_batches))
    return session.metric_sums.totals(session.metric_sums.reduce(total)).means
