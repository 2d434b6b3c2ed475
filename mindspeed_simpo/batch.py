"""The typed records that travel between rooms.

Shape legend: ``pair`` = P preference pairs, ``row`` = 2P sequences (chosen rows 0..P-1, then rejected rows P..2P-1, in
the same pair order), ``seq`` = padded sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORE_INDEX = -100
"""Target of a position that predicts no response token (prompt, padding, after the end of turn)."""

FILLER_PAIR = -1
"""``pair_ids`` entry of a pair that only fills a batch up: it has no response token and weight zero."""


@dataclass(frozen=True)
class TokenizedPair:
    """One preference pair as token ids; ``prompt_ids + chosen_ids`` and ``prompt_ids + rejected_ids`` are scored."""

    prompt_ids: list[int]
    """BOS (where the template has one), every turn before the response and the assistant header."""
    chosen_ids: list[int]
    """Response tokens and the end-of-turn token; at least one."""
    rejected_ids: list[int]
    """Response tokens and the end-of-turn token; at least one."""
    source: str
    """Where the row comes from, for messages: ``FILE:LINE`` or ``FILE:row N``."""

    @property
    def length(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch of pairs, right-padded, with targets already shifted on the whole sequence."""

    tokens: Int[Tensor, "row seq"]
    """int64 token ids; padding repeats id 0 and is never a target."""
    targets: Int[Tensor, "row seq"]
    """int64 id of the next token where that is a response token, else ``IGNORE_INDEX``."""
    lengths: Int[Tensor, " row"]
    """int64 tokens of each row without its padding; 0 for the rows of a filler pair."""
    pair_ids: Int[Tensor, " pair"]
    """int64 row number in the dataset, or ``FILLER_PAIR``."""

    @property
    def num_pairs(self) -> int:
        """Pairs in this micro-batch, fillers included."""
        return self.pair_ids.numel()

    def to(self, device: torch.device) -> PairBatch:
        """The same micro-batch with its tensors on ``device``."""
        return PairBatch(
            tokens=self.tokens.to(device),
            targets=self.targets.to(device),
            lengths=self.lengths.to(device),
            pair_ids=self.pair_ids.to(device),
        )


@dataclass(frozen=True)
class LossInputs:
    """What an objective needs of each pair; sums are whole-sequence and whole-vocabulary (reduced over TP and CP)."""

    chosen_logprob: Float[Tensor, " pair"]
    """Sum of response-token log-probabilities, nats, fp32 or fp64."""
    rejected_logprob: Float[Tensor, " pair"]
    chosen_tokens: Int[Tensor, " pair"]
    """Response tokens that the sum runs over; 0 only for a filler pair."""
    rejected_tokens: Int[Tensor, " pair"]
    reference_chosen_logprob: Float[Tensor, " pair"] | None = None
    """The same sums under the reference model, nats; DPO only."""
    reference_rejected_logprob: Float[Tensor, " pair"] | None = None

    @property
    def valid(self) -> Bool[Tensor, " pair"]:
        """False for filler pairs."""
        return (self.chosen_tokens > 0) & (self.rejected_tokens > 0)


@dataclass(frozen=True)
class LossOutput:
    """Per-pair results, not reduced: ``schedule`` owns the normalisation."""

    loss: Float[Tensor, " pair"]
    """Nats; zero, with zero gradient, for filler pairs."""
    sft_loss: Float[Tensor, " pair"]
    """``-m_w``, nats per token, detached."""
    chosen_reward: Float[Tensor, " pair"]
    """Detached, without the margin."""
    rejected_reward: Float[Tensor, " pair"]
