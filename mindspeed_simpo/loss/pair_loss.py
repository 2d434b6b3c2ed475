"""The loss of each pair: an objective's formula with its keys bound, and the supervised term of ``pref_ftx``."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_simpo.config.options import TaskOptions
from mindspeed_simpo.losses import LossInputs, LossOutput
from mindspeed_simpo.objectives import Keys, Objective


@dataclass(frozen=True)
class PairLoss:
    """``formula(pair) + pref_ftx * (-m_w)`` with ``m_w`` the chosen response's mean log-probability per token.

    The supervised term is not divided by the length a second time: ``m_w`` is the mean already.
    """

    objective: Objective
    keys: Keys
    """The keys of the objective, with their values."""
    pref_ftx: float = 0.0
    """Weight of the supervised term, >= 0."""

    @classmethod
    def of(cls, options: TaskOptions) -> PairLoss:
        """The objective that ``options.stage`` names, with its keys bound."""
        return cls(options.objective, options.keys_of(options.objective), options.pref_ftx)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Evaluate the objective.

        Args:
            inputs: Sums and counts of each pair, already reduced over TP and CP; with the reference sums where
                ``objective.needs_reference``.

        Returns:
            Values of each pair, not reduced; all are 0 for a filler pair.

        Raises:
            ValueError: where the objective needs reference sums and ``inputs`` has none.
        """
        terms = self.objective.formula(inputs, self.keys)
        assert terms.metrics.keys() == self.objective.metrics.keys(), "a formula returns the metrics that it declares"
        chosen_mean, _ = inputs.scores(mean=True)
        return LossOutput(
            loss=inputs.of_valid(terms.loss - self.pref_ftx * chosen_mean),
            sft_loss=-chosen_mean.detach(),
            chosen_reward=inputs.of_valid(terms.chosen_reward.detach()),
            rejected_reward=inputs.of_valid(terms.rejected_reward.detach()),
            metrics={name: inputs.of_valid(values.detach()) for name, values in terms.metrics.items()},
        )
