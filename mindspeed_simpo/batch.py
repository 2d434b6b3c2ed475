"""The typed records that travel between rooms.

Shape legend: ``pair`` = P preference pairs, ``sequence`` = their 2P sequences (chosen 0..P-1, then rejected P..2P-1, in
the same pair order), ``row`` = rows of the model's input (2P right-padded ones, or 1 that is packed), ``seq`` = their
length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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
    def lengths(self) -> tuple[int, int, int]:
        """Tokens of prompt, chosen and rejected response."""
        return len(self.prompt_ids), len(self.chosen_ids), len(self.rejected_ids)

    @property
    def length(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


class Branch(NamedTuple):
    """Tokens that go on from tokens which lie elsewhere in the row."""

    prefix_start: int
    """Where in the row the tokens lie that it goes on from."""
    prefix_length: int
    """Their number; 0 where it goes on from nothing."""
    length: int
    """Its own tokens."""


@dataclass(frozen=True)
class Documents:
    """What attends to what in a packed row: nothing but this is needed, and no mask is ever made of it.

    The row is ``wholes``, end to end, then ``branches``, end to end.
    """

    wholes: tuple[int, ...]
    """Tokens of each document that attends causally to itself."""
    branches: tuple[Branch, ...] = ()
    """Each attends to its prefix, and causally to itself."""


ONE_A_ROW = Documents(())
"""Where nothing is packed: each row is one right-padded document."""


@dataclass(frozen=True)
class Packing:
    """What a packed row is made of."""

    documents: Documents
    positions: Int[Tensor, " seq"]
    """int64 place of each token in its own sequence."""
    pair_of: Int[Tensor, " seq"]
    """int64 number of the pair that each token is of; 0 for padding, which has no target."""
    num_pairs: int

    def to(self, device: torch.device) -> Packing:
        """The same with its tensors on ``device``."""
        return Packing(self.documents, moved(self.positions, device), moved(self.pair_of, device), self.num_pairs)


@dataclass(frozen=True)
class ScoredTokens:
    """Where the response tokens of some rows are, as indices: a device that has them need not search its targets."""

    state: Int[Tensor, " token"]
    """int64 index, in hidden states ``[seq, row, hidden]`` whose first two axes are one, of what predicts the token."""
    target: Int[Tensor, " token"]
    """int64 id of the token."""
    sequence: Int[Tensor, " token"]
    """int64 number of the sequence that it is of."""
    place: Int[Tensor, " token"]
    """int64 position in its row of what predicts it."""
    num_sequences: int
    seq_length: int
    """Positions of a row."""

    @classmethod
    def of(cls, targets: Int[Tensor, "target_row seq"], packing: Packing | None = None) -> ScoredTokens:
        """Find them, which on an accelerator waits for its queue: pass targets that are still on the host.

        Args:
            targets: See :class:`PairBatch`; or those of the positions that a context-parallel rank holds.
            packing: Set where the two rows of targets are of one row of tokens.
        """
        row, place = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
        if packing is None:
            state, sequence, sequences = place * len(targets) + row, row, len(targets)
        else:
            sequences = len(targets) * packing.num_pairs
            state, sequence = place, row * packing.num_pairs + packing.pair_of[place]
        return cls(state, targets[row, place], sequence, place, sequences, targets.shape[1])

    def to(self, device: torch.device) -> ScoredTokens:
        """The same with its tensors on ``device``."""
        return ScoredTokens(
            moved(self.state, device),
            moved(self.target, device),
            moved(self.sequence, device),
            moved(self.place, device),
            self.num_sequences,
            self.seq_length,
        )


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch of pairs, with targets already shifted on the whole sequence."""

    tokens: Int[Tensor, "row seq"]
    """int64 token ids; padding repeats id 0 and is never a target."""
    targets: Int[Tensor, "target_row seq"]
    """int64 id of the next token where that is a response token, else ``IGNORE_INDEX``. One row for each row of tokens;
    two for a packed one: of the chosen responses, of the rejected ones. A token that both go on from has two."""
    lengths: Int[Tensor, " sequence"]
    """int64 tokens of each sequence, a shared prompt counted in both; 0 for those of a filler pair."""
    pair_ids: Int[Tensor, " pair"]
    """int64 row number in the dataset, or ``FILLER_PAIR``."""
    packing: Packing | None = None
    """Set where one row holds all sequences; None where each has a row of its own."""

    @property
    def num_pairs(self) -> int:
        """Pairs in this micro-batch, fillers included."""
        return self.pair_ids.numel()

    @property
    def response_tokens(self) -> Int[Tensor, " sequence"]:
        """Targets of each sequence."""
        scored = (self.targets != IGNORE_INDEX).long()
        if self.packing is None:
            return scored.sum(dim=1)
        counts = scored.new_zeros(len(scored), self.num_pairs)
        return counts.index_add_(1, self.packing.pair_of, scored).flatten()

    def to(self, device: torch.device) -> PairBatch:
        """The same micro-batch with its tensors on ``device``."""
        return PairBatch(
            tokens=moved(self.tokens, device),
            targets=moved(self.targets, device),
            lengths=moved(self.lengths, device),
            pair_ids=moved(self.pair_ids, device),
            packing=self.packing.to(device) if self.packing is not None else None,
        )


@dataclass(frozen=True)
class RunningStatistics:
    """Mean and deviation of an objective's tracked value over the global batches so far; constants of the loss."""

    mean: Float[Tensor, ""]
    deviation: Float[Tensor, ""]


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
    """The same sums under the reference model, nats; where the objective has one."""
    reference_rejected_logprob: Float[Tensor, " pair"] | None = None
    running: RunningStatistics | None = None
    """Of the objective's tracked value; None before the first global batch, and where nothing is tracked."""

    @property
    def valid(self) -> Bool[Tensor, " pair"]:
        """False for filler pairs."""
        return (self.chosen_tokens > 0) & (self.rejected_tokens > 0)

    def of_valid(self, values: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        """``values``, 0 with gradient 0 for filler pairs, whatever ``values`` holds for them."""
        return torch.where(self.valid, values, 0.0)

    def scores(self, *, mean: bool) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        """Log-probabilities of chosen and rejected: ``m = s / n``, nats per token, or the sums ``s``, nats."""
        return self._scores(self.chosen_logprob, self.rejected_logprob, mean)

    def reference_scores(self, *, mean: bool) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        """:meth:`scores` under the reference model.

        Raises:
            ValueError: where there is no reference.
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
        """What a formula returns."""
        return ObjectiveTerms(loss, chosen_reward, rejected_reward, metrics)


@dataclass(frozen=True)
class ObjectiveTerms:
    """What a formula says of each pair; entries of filler pairs are not used."""

    loss: Float[Tensor, " pair"]
    """Nats, without the supervised term of ``pref_ftx``."""
    chosen_reward: Float[Tensor, " pair"]
    rejected_reward: Float[Tensor, " pair"]
    metrics: Mapping[str, Float[Tensor, " pair"]]
    """The metrics that the objective declares."""


@dataclass(frozen=True)
class LossOutput:
    """Per-pair results, not reduced: ``schedule`` owns the normalisation. All zero for filler pairs."""

    loss: Float[Tensor, " pair"]
    """Nats; with gradient zero for filler pairs."""
    sft_loss: Float[Tensor, " pair"]
    """``-m_w``, nats per token, detached."""
    chosen_reward: Float[Tensor, " pair"]
    """Detached, without the margin."""
    rejected_reward: Float[Tensor, " pair"]
    metrics: Mapping[str, Float[Tensor, " pair"]] = field(default_factory=dict)
    """The objective's own metrics, detached."""


def even_halves(chosen: Sequence[int], rejected: Sequence[int]) -> list[int]:
    """One side of each pair, 0 chosen or 1 rejected, so that these and the others have about equally many tokens.

    The pair whose sides differ most comes first; its longer side goes where fewer tokens are so far.

    Args:
        chosen: Tokens of each pair's chosen sequence; ``rejected`` likewise.
        rejected: See ``chosen``.
    """
    sides = [0] * len(chosen)
    excess = 0
    differences = [one - other for one, other in zip(chosen, rejected, strict=True)]
    for pair in sorted(range(len(sides)), key=lambda pair: (-abs(differences[pair]), pair)):
        sides[pair] = int(excess * differences[pair] > 0)
        excess += differences[pair] * (1 - 2 * sides[pair])
    return sides


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; the host goes on at once, for it is copied from page-locked memory."""
    if tensor.device == device or device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
