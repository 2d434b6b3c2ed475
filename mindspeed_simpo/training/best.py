"""Which evaluation was the best so far, and for how many evaluations there was no better one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import BaseModel

from mindspeed_simpo.config.options import WatchOptions
from mindspeed_simpo.errors import ConfigError


class Best(BaseModel):
    """The best evaluation after a step of training; part of each checkpoint."""

    metric: str
    greater: bool
    """Whether higher values are better."""
    step: int | None = None
    """Of the best evaluation; None before the first with a finite value."""
    value: float | None = None
    """Of the metric."""
    without_improvement: int = 0
    """Evaluations in a row, up to the last, that were no improvement."""

    @classmethod
    def of(cls, options: WatchOptions) -> Best | None:
        """The state before the first evaluation; None where no metric is configured."""
        metric = options.metric_for_best_model
        return None if metric is None else cls(metric=metric, greater=options.best_is_greater)

    def value_in(self, metrics: Mapping[str, float]) -> float:
        """The metric's value.

        Raises:
            ConfigError: where the evaluation has no such metric.
        """
        if self.metric not in metrics:
            raise ConfigError(
                f"metric_for_best_model: the evaluations have no metric {self.metric!r}; they have {', '.join(metrics)}"
            )
        return metrics[self.metric]

    def after(self, step: int, value: float, threshold: float = 0.0) -> Best:
        """The state after another evaluation.

        Args:
            step: Of the evaluation.
            value: Of the metric; one that is not finite is never better.
            threshold: Change up to which a better value does not count as an improvement.
        """
        gain = math.inf if self.value is None else (value - self.value) * (1 if self.greater else -1)
        if not math.isfinite(value) or gain <= 0:
            return self.model_copy(update={"without_improvement": self.without_improvement + 1})
        stale = 0 if gain > threshold else self.without_improvement + 1
        return self.model_copy(update={"step": step, "value": value, "without_improvement": stale})

    def continues(self, other: Best | None) -> bool:
        """Whether ``other``, of a checkpoint, is about the same metric."""
        return other is not None and (other.metric, other.greater) == (self.metric, self.greater)
