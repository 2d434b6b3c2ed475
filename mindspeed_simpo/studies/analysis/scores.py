"""The records of an analysis: what a model gives each pair, and the pairs that are shown with their text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

Numbers = dict[str, Any]
"""A part of ``analysis.json``."""


@dataclass(frozen=True)
class PairScores:
    """What one model gives each pair; the entries of all arrays are in the same order of pairs."""

    chosen_logprob: Float64[np.ndarray, " pair"]
    """Sum of the log-probabilities of the chosen response's tokens, nats."""
    rejected_logprob: Float64[np.ndarray, " pair"]
    """Sum of the log-probabilities of the rejected response's tokens, nats."""
    chosen_tokens: Float64[np.ndarray, " pair"]
    """Tokens in the chosen sum."""
    rejected_tokens: Float64[np.ndarray, " pair"]
    """Tokens in the rejected sum."""
    chosen_reward: Float64[np.ndarray, " pair"]
    """Reward of the chosen response, as the model's own objective defines rewards."""
    rejected_reward: Float64[np.ndarray, " pair"]
    """Reward of the rejected response."""
    loss: Float64[np.ndarray, " pair"]
    """Loss of the model's own objective."""

    @classmethod
    def names(cls) -> list[str]:
        """The arrays, in their order."""
        return [field.name for field in fields(cls)]

    @property
    def margin(self) -> Float64[np.ndarray, " pair"]:
        """Reward margin: reward of the chosen minus reward of the rejected response."""
        margin: Float64[np.ndarray, " pair"] = self.chosen_reward - self.rejected_reward
        return margin

    @property
    def chosen_mean(self) -> Float64[np.ndarray, " pair"]:
        """Average log-probability of the chosen response, nats per token."""
        mean: Float64[np.ndarray, " pair"] = self.chosen_logprob / self.chosen_tokens
        return mean

    @property
    def rejected_mean(self) -> Float64[np.ndarray, " pair"]:
        """Average log-probability of the rejected response, nats per token."""
        mean: Float64[np.ndarray, " pair"] = self.rejected_logprob / self.rejected_tokens
        return mean

    @property
    def length_difference(self) -> Float64[np.ndarray, " pair"]:
        """Tokens of the chosen minus tokens of the rejected response."""
        difference: Float64[np.ndarray, " pair"] = self.chosen_tokens - self.rejected_tokens
        return difference

    @property
    def right(self) -> Bool[np.ndarray, " pair"]:
        """Whether the chosen response has the larger reward; equal rewards are wrong."""
        return self.chosen_reward > self.rejected_reward

    @property
    def likelier(self) -> Bool[np.ndarray, " pair"]:
        """Whether the chosen response has the larger average log-probability."""
        return self.chosen_mean > self.rejected_mean

    def means(self) -> dict[str, float]:
        """The mean over pairs of what ``evaluate`` reports too, by the same names."""
        values = {
            "loss": self.loss,
            "rewards/chosen": self.chosen_reward,
            "rewards/rejected": self.rejected_reward,
            "rewards/accuracies": self.right,
            "rewards/margins": self.margin,
            "logps/chosen": self.chosen_mean,
            "logps/rejected": self.rejected_mean,
            "response_tokens/chosen": self.chosen_tokens,
            "response_tokens/rejected": self.rejected_tokens,
        }
        return {name: float(np.mean(value)) for name, value in values.items()}


@dataclass(frozen=True)
class Pairs:
    """The analysed pairs."""

    indices: Int64[np.ndarray, " pair"]
    """Index of each pair in the data set, ascending."""
    places: Sequence[str]
    """Where each pair comes from, ``FILE:LINE``."""
    sources: Sequence[str]
    """Names of the sources of the data."""
    source_of: Int64[np.ndarray, " pair"]
    """Index of each pair's source."""


@dataclass(frozen=True)
class Piece:
    """One or more consecutive tokens of an answer that together are text."""

    text: str
    logprobs: tuple[float, ...]
    """Log-probability of each token, nats; empty for tokens that are not scored."""


@dataclass(frozen=True)
class ShownAnswers:
    """Text of a pair, with the log-probabilities of the answers' tokens under one model."""

    prompt: str
    chosen: Sequence[Piece]
    rejected: Sequence[Piece]


@dataclass(frozen=True)
class Measured:
    """One model, and what it gives the pairs."""

    label: str
    """Short name in the legends."""
    weights: str
    """What was scored, such as ``step 500 of outputs/simpo``."""
    stage: str
    title: str
    """Name of the objective."""
    keys: Mapping[str, Any]
    """Values of the objective's keys."""
    rewards: str
    """Definition of the rewards, in one phrase."""
    step: int | None
    """None for weights that no checkpoint holds."""
    history: Sequence[Mapping[str, Any]]
    """The lines of ``metrics.jsonl``; empty where the weights belong to no run."""
    scores: PairScores
    shown: Mapping[int, ShownAnswers]
    """By position among the analysed pairs: those whose text is shown."""
