"""Running statistics of an objective's tracked value, independent of the layout and stored in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mindspeed_simpo.device import Device
from mindspeed_simpo.loss.scoring import ScoredBatch
from mindspeed_simpo.losses import RunningStatistics
from mindspeed_simpo.objectives import Objective
from mindspeed_simpo.parallel import Groups

_KEPT = 0.9
"""Weight of the previous statistics in an update; the value of the authors of alpha-DPO."""


class RunningState(BaseModel):
    """The statistics in a checkpoint; JSON represents both numbers exactly."""

    model_config = ConfigDict(frozen=True)

    mean: float
    deviation: float


class RunningTracker:
    """``mean <- 0.9 mean + 0.1 mean_b`` and ``deviation <- 0.9 deviation + 0.1 deviation_b`` over the global batches b.

    The first global batch sets ``mean = mean_b`` and ``deviation = deviation_b``. ``mean_b`` and ``deviation_b`` are
    the mean and the standard deviation (n - 1 in the denominator; 0 for one pair) over all pairs of the global batch on
    all ranks, so they depend neither on the micro-batches nor on the layout. The loss of a global batch uses the
    statistics of the previous global batches.
    """

    def __init__(self, objective: Objective, groups: Groups, device: Device) -> None:
        self._tracked = objective.tracked
        self._groups = groups
        self._device = device
        self._current: RunningStatistics | None = None

    def current(self) -> RunningStatistics | None:
        """The current statistics; None before the first global batch, and where the objective tracks nothing."""
        return self._current

    @torch.no_grad()
    def update(self, scored: Sequence[ScoredBatch]) -> None:
        """Update with one global batch; a collective of the world, without a host synchronisation.

        Args:
            scored: This rank's micro-batches of the global batch; empty except on the last pipeline rank.
        """
        if self._tracked is None:
            return
        before = self._current
        centre = before.mean if before is not None else self._zero()
        sums = torch.stack([self._zero() for _ in range(3)])
        if self._groups.contributes_loss:
            for item in scored:
                valid = item.inputs.valid.to(sums.dtype)
                # centred at the previous mean, so that the variance does not suffer from cancellation
                distance = self._tracked(item.inputs).to(sums.dtype) - centre
                sums += torch.stack([torch.ones_like(valid), distance, distance.square()]) @ valid
        dist.all_reduce(sums, group=self._groups.world)
        count, total, squares = sums
        variance = (squares - total.square() / count) / (count - 1).clamp(min=1)
        mean, deviation = centre + total / count, variance.clamp(min=0).sqrt()
        if before is not None:
            mean = _KEPT * before.mean + (1 - _KEPT) * mean
            deviation = _KEPT * before.deviation + (1 - _KEPT) * deviation
        self._current = RunningStatistics(mean, deviation)

    def state(self) -> RunningState | None:
        """The current statistics for a checkpoint; forces a host synchronisation."""
        if self._current is None:
            return None
        return RunningState(mean=self._current.mean.item(), deviation=self._current.deviation.item())

    def load(self, state: RunningState | None) -> None:
        """Restore what :meth:`state` returned."""
        self._current = (
            None if state is None else RunningStatistics(self._number(state.mean), self._number(state.deviation))
        )

    def _zero(self) -> Tensor:
        return self._number(0.0)

    def _number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=self._device.reduction_dtype, device=self._device.torch_device)
