"""The best checkpoint of a run and early stopping: decided once for all ranks, and exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mindspeed_simpo.parallel.collectives import fail_together, of_first_rank
from mindspeed_simpo.training import checkpoint
from mindspeed_simpo.training.best import Best
from mindspeed_simpo.training.session import Session


class BestModel:
    """Compares the evaluations of a run where ``metric_for_best_model`` is set.

    Args:
        session: The run's session.
        root: Folder of the run's checkpoints.
    """

    def __init__(self, session: Session, root: Path) -> None:
        self._session, self._root = session, root
        self.state = Best.of(session.config)
        """Part of each checkpoint; None where no metric is configured."""

    def judge(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation has the best value so far; a collective of the world.

        The weights before the first step are no candidate.

        Raises:
            ConfigError: on every rank, where the evaluation has no such metric.
        """
        if self.state is None:
            return False
        before, control = self.state, self._session.groups.control
        with fail_together(control):
            value = before.value_in(metrics)
        if step == 0:
            return False
        # one decision for all ranks, whatever the last bit of their sums
        value = of_first_rank(value, control)
        self.state = before.after(step, value, self._session.config.early_stopping_threshold)
        return self.state.step != before.step

    @property
    def stops_early(self) -> bool:
        """Whether the last ``early_stopping_patience`` evaluations were no improvement."""
        patience = self._session.config.early_stopping_patience
        return self.state is not None and patience is not None and self.state.without_improvement >= patience

    def load(self, last_step: int) -> int:
        """Give the models the weights of the best step, if there is one; a collective of the world.

        Args:
            last_step: The step whose weights the models have.

        Returns:
            The step whose weights the models have now.

        Raises:
            CheckpointError: on every rank, where the best checkpoint is damaged.
        """
        best = None if self.state is None else self.state.step
        if best is None or best == last_step:
            return last_step
        groups = self._session.groups
        folder, state = checkpoint.find(str(checkpoint.folder_of(self._root, best)), groups.control)
        checkpoint.load(folder, self._session.models, None, groups, self._session.device)
        return state.step
