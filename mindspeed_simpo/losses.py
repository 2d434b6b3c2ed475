"""The records of losses: what an objective gets of each pair, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class RunningStatistics:
    """Running mean and standard deviation of an objective's tracked value; the loss treats both as constants."""

    mean: Float[Tensor, ""]
    deviation: Float[Tensor, ""]
    """Standard deviation."""


@dataclass(frozen=True)
class LossInputs:
    """The inputs of an objective for each pair; log-probability sums are already reduced over TP and CP."""

    chosen_logprob: Float[Tensor, " pair"]
    """Sum of the log-probabilities of the chosen response's tokens, nats, fp32 or fp64."""
    rejected_logprob: Float[Tensor, " pair"]
    """Sum of the log-probabilities of the rejected response's tokens, nats, fp32 or fp64."""
    chosen_tokens: Int[Tensor, " pair"]
    """Response tokens in the chosen sum; 0 only for a filler pair."""
    rejected_tokens: Int[Tensor, " pair"]
    """Response tokens in the rejected sum; 0 only for a filler pair."""
    reference_chosen_logprob: Float[Tensor, " pair"] | None = None
    """``chosen_logprob`` under the reference model; None for an objective without a reference model."""
    reference_rejected_logprob: Float[Tensor, " pair"] | None = None
    """``rejected_logprob`` under the reference model; None for an objective without a reference model."""
    running: RunningStatistics | None = None
    """Statistics of the tracked value; None before the first global batch and where the objective tracks nothing."""

    @property
    def valid(self) -> Bool[Tensor, " pair"]:
        """False for filler pairs."""
        return (self.chosen_tokens > 0) & (self.rejected_tokens > 0)

    def of_valid(self, values: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        """``values`` with the entries of filler pairs, NaN included, replaced by 0 with gradient 0."""
        return torch.where(self.valid, values, 0.0)

    def scores(self, *, mean: bool) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        """Chosen and rejected log-probabilities: means ``m = s / n``, nats per token, or sums ``s``, nats.

        Args:
            mean: Whether to divide each sum ``s`` by its number of response tokens ``n``.
        """
        return self._scores(self.chosen_logprob, self.rejected_logprob, mean)

    def reference_scores(self, *, mean: bool) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        """:meth:`scores` under the reference model.

        Raises:
            ValueError: where the reference log-probabilities are None.
        """
        if self.reference_chosen_logprob is None or self.reference_rejected_logprob is None:
            raise ValueError("the objective needs the reference log-probabilities of both responses")
        return self._scores(self.reference_chosen_logprob, self.reference_rejected_logprob, mean)

    def _scores(self, chosen: Tensor, rejected: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.of_valid(chosen), self.of_valid(rejected)
        if not mean:
            return chosen, rejected
        return chosen / self.chosen_tokens.clamp(min=1), rejected / self.rejected_tokens.clamp(min=1)

    @staticmethod
    def terms(
        loss: Float[Tensor, " pair"],
        chosen_reward: Float[Tensor, " pair"],
        rejected_reward: Float[Tensor, " pair"],
        **metrics: Float[Tensor, " pair"],
    ) -> ObjectiveTerms:
        """Build the return value of a formula; ``metrics`` are the metrics that the objective declares."""
        return ObjectiveTerms(loss, chosen_reward, rejected_reward, metrics)


@dataclass(frozen=True)
class ObjectiveTerms:
    """The result of an objective's formula for each pair; entries of filler pairs are discarded."""

    loss: Float[Tensor, " pair"]
    """Loss without the supervised term of ``pref_ftx``, with its graph."""
    chosen_reward: Float[Tensor, " pair"]
    """Reward of the chosen response, in the unit that the objective declares."""
    rejected_reward: Float[Tensor, " pair"]
    """Reward of the rejected response, in the same unit."""
    metrics: Mapping[str, Float[Tensor, " pair"]]
    """Name -> value of the metrics that the objective declares."""


@dataclass(frozen=True)
class LossOutput:
    """Results for each pair, not reduced: the pair schedule divides by the global batch size. 0 for filler pairs."""

    loss: Float[Tensor, " pair"]
    """Loss with the supervised term of ``pref_ftx``; the gradient is 0 for filler pairs."""
    sft_loss: Float[Tensor, " pair"]
    """``-m_w``, nats per token, detached."""
    chosen_reward: Float[Tensor, " pair"]
    """Reward of the chosen response, without the margin, detached."""
    rejected_reward: Float[Tensor, " pair"]
    """Reward of the rejected response, without the margin, detached."""
    metrics: Mapping[str, Float[Tensor, " pair"]] = field(default_factory=dict)
    """Name -> value of the metrics that the objective declares, detached."""
