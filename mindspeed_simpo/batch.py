"""The typed records that the packages of this project exchange: token ids, micro-batches, inputs and outputs of losses.

Shape legend: ``pair`` = P preference pairs, ``sequence`` = the 2P sequences of the pairs (chosen 0..P-1, then rejected
P..2P-1, in the same pair order), ``row`` = rows of the model's input tensor (2P right-padded rows, or 1 packed row),
``seq`` = length of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mindspeed_simpo.batch_images import BatchImages

IGNORE_INDEX = -100
"""Target of a position that predicts no response token (prompt, padding, after the end of turn)."""

FILLER_PAIR = -1
"""``pair_ids`` entry of a filler pair, which completes a batch; a filler pair has no response token and weight zero."""


@dataclass(frozen=True)
class TokenizedPair:
    """One preference pair as token ids; ``prompt_ids + chosen_ids`` and ``prompt_ids + rejected_ids`` are scored."""

    prompt_ids: list[int]
    """BOS (where the template has one), every turn before the response and the assistant header."""
    chosen_ids: list[int]
    """Tokens of the answer, up to and including its last end-of-turn token; at least one."""
    rejected_ids: list[int]
    """The same of the rejected answer."""
    source: str
    """Where the example comes from, for messages: ``FILE:LINE`` or ``FILE:row N``."""
    chosen_unscored: Sequence[int] = ()
    """First and stop index of each range of ``chosen_ids`` that is not scored, end to end: what tools return between
    the assistant turns of an answer, and an empty thought that the model is given."""
    rejected_unscored: Sequence[int] = ()
    """The same for ``rejected_ids``."""
    images: Sequence[Any] = ()
    """The images of the prompt, in the order of their places, see :class:`~mindspeed_simpo.data.images.StoredImage`."""

    @property
    def chosen_targets(self) -> list[int]:
        """``chosen_ids`` with ``IGNORE_INDEX`` at the tokens that are not scored."""
        return _scored_only(self.chosen_ids, self.chosen_unscored)

    @property
    def rejected_targets(self) -> list[int]:
        """``rejected_ids`` with ``IGNORE_INDEX`` at the tokens that are not scored."""
        return _scored_only(self.rejected_ids, self.rejected_unscored)

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Tokens of prompt, chosen and rejected response."""
        return len(self.prompt_ids), len(self.chosen_ids), len(self.rejected_ids)

    @property
    def length(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def _scored_only(ids: list[int], unscored: Sequence[int]) -> list[int]:
    targets = list(ids)
    for start, stop in zip(unscored[::2], unscored[1::2], strict=True):
        targets[start:stop] = [IGNORE_INDEX] * (stop - start)
    return targets


class Branch(NamedTuple):
    """A suffix: consecutive tokens of a packed row that continue a prefix, which lies elsewhere in the same row."""

    prefix_start: int
    """Position in the row of the prefix's first token."""
    prefix_length: int
    """Tokens of the prefix; 0 for a suffix without a prefix."""
    length: int
    """Tokens of the suffix."""


@dataclass(frozen=True)
class Documents:
    """The attention pattern of a packed row: ``wholes``, end to end, then ``branches``, end to end.

    Attention is computed document by document from these lengths, so no ``[seq, seq]`` mask is built.
    """

    wholes: tuple[int, ...]
    """Length of each document without a prefix; the document attends causally to itself."""
    branches: tuple[Branch, ...] = ()
    """Suffixes; each attends to all of its prefix and causally to itself."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document and of each branch, in the order of the row."""
        return (*self.wholes, *(branch.length for branch in self.branches))

    def prefix_of(self, document: int) -> tuple[int, int]:
        """First position in the row, and tokens, of the prefix of a document; both 0 where it has none.

        Args:
            document: Index in :attr:`lengths`.
        """
        branch = document - len(self.wholes)
        return self.branches[branch][:2] if branch >= 0 else (0, 0)

    def with_padding(self, tokens: int) -> Documents:
        """The pattern of the row with ``tokens`` further positions at its end, which attend to themselves."""
        if not tokens:
            return self
        if not self.branches:
            return Documents((*self.wholes, tokens))
        return Documents(self.wholes, (*self.branches, Branch(0, 0, tokens)))


UNPACKED = Documents(())
"""The pattern of a batch that is not packed: each row is one right-padded document."""


@dataclass(frozen=True)
class Packing:
    """The documents of a packed row, and the position and the pair of each of its tokens."""

    documents: Documents
    positions: Int[Tensor, " seq"]
    """int64 position of each token in its own sequence."""
    pair_of: Int[Tensor, " seq"]
    """int64 index of each token's pair in the micro-batch; 0 for padding, which has no target."""
    num_pairs: int

    def at(self, held: Int[Tensor, " held"]) -> Packing:
        """The packing of the tokens at some positions of the row; ``documents`` remain those of the full row."""
        return dataclasses.replace(self, positions=self.positions[held], pair_of=self.pair_of[held])

    def with_padding(self, tokens: int) -> Packing:
        """The packing of the row with ``tokens`` further positions at its end, which belong to no sequence."""
        positions, pair_of = (torch.nn.functional.pad(each, (0, tokens)) for each in (self.positions, self.pair_of))
        return Packing(self.documents.with_padding(tokens), positions, pair_of, self.num_pairs)

    def to(self, device: torch.device) -> Packing:
        """A copy with the tensors on ``device``."""
        return Packing(
            self.documents, to_device(self.positions, device), to_device(self.pair_of, device), self.num_pairs
        )


@dataclass(frozen=True)
class SequenceMembers:
    """The sequences that the tokens of some rows belong to, for a loss of whole sequences."""

    of_token: Int[Tensor, "2 row held"]
    """int64 index of a sequence, or -1: each token belongs to at most two, a shared prompt to those of both responses.
    Padding belongs to none."""
    lengths: Int[Tensor, " sequence"]
    """int64 tokens of each sequence, over all context-parallel ranks."""
    weight: float
    """Factor of each sequence's loss."""

    def to(self, device: torch.device) -> SequenceMembers:
        """A copy with the tensors on ``device``."""
        return SequenceMembers(to_device(self.of_token, device), to_device(self.lengths, device), self.weight)


@dataclass(frozen=True)
class ScoredTokens:
    """Indices of the response tokens of some rows, found on the host.

    With these indices no ``nonzero()`` runs on the device, where ``nonzero()`` forces a host synchronisation.
    """

    state: Int[Tensor, " token"]
    """int64 index of the hidden state that predicts the token, in hidden states ``[seq, row, hidden]`` flattened to
    ``[seq * row, hidden]``."""
    target: Int[Tensor, " token"]
    """int64 id of the token."""
    sequence: Int[Tensor, " token"]
    """int64 index of the token's sequence."""
    position: Int[Tensor, " token"]
    """int64 position in the row that predicts the token."""
    token: Int[Tensor, "copy state"]
    """int64 number, among all tokens, of the token that each hidden state predicts, the inverse of ``state``; where a
    state predicts none, the number of tokens. It has several rows where a state predicts several tokens."""
    num_sequences: int
    seq_length: int
    """Length of a row."""

    @classmethod
    def of(cls, targets: Int[Tensor, "target_row seq"], packing: Packing | None = None) -> ScoredTokens:
        """The response tokens of ``targets``; calls ``nonzero()``, so pass targets in host memory.

        Args:
            targets: As in :class:`PairBatch`, or their slice at the positions of one context-parallel rank.
            packing: Set where all rows of targets belong to one packed row of tokens.
        """
        scored = targets != IGNORE_INDEX
        row, position = scored.nonzero(as_tuple=True)
        token = (scored.flatten().cumsum(0) - 1).view_as(targets).masked_fill(~scored, len(row))
        if packing is None:
            state, sequence, sequences = position * len(targets) + row, row, len(targets)
            token = token.t().reshape(1, -1)
        else:
            sequences = len(targets) * packing.num_pairs
            state, sequence = position, row * packing.num_pairs + packing.pair_of[position]
            if not (scored.sum(0) > 1).any():
                token = token.amin(0, keepdim=True)
        return cls(state, targets[row, position], sequence, position, token, sequences, targets.shape[1])

    def each_alone(self, places: Int[Tensor, " seq"], seq_length: int) -> ScoredTokens:
        """The same tokens, each as a sequence of its own, so that the sums of sequences are those of single tokens.

        Args:
            places: int64 place in the full row of each of these positions.
            seq_length: Length of the full row. The token that place ``p`` of sequence ``s`` predicts becomes sequence
                ``s * seq_length + p``.
        """
        sequence = self.sequence * seq_length + places[self.position]
        alone = torch.zeros_like(self.position)
        return ScoredTokens(self.state, self.target, sequence, alone, self.token, self.num_sequences * seq_length, 1)

    def to(self, device: torch.device) -> ScoredTokens:
        """A copy with the tensors on ``device``."""
        return ScoredTokens(
            to_device(self.state, device),
            to_device(self.target, device),
            to_device(self.sequence, device),
            to_device(self.position, device),
            to_device(self.token, device),
            self.num_sequences,
            self.seq_length,
        )


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch of pairs. Targets are shifted before any sequence is sliced over context-parallel ranks."""

    tokens: Int[Tensor, "row seq"]
    """int64 token ids; padding has id 0 and is never a target."""
    targets: Int[Tensor, "target_row seq"]
    """int64 id of the next token where the next token is a response token, else ``IGNORE_INDEX``. A padded batch has
    one row of targets for each row of tokens. A packed batch has two rows of targets, for the chosen and for the
    rejected responses, because the last token of a shared prompt predicts the first token of both responses."""
    lengths: Int[Tensor, " sequence"]
    """int64 tokens of each sequence, prompt included (a shared prompt in both sequences); 0 for filler pairs."""
    pair_ids: Int[Tensor, " pair"]
    """int64 index of the example in the dataset, or ``FILLER_PAIR``."""
    identities: Int[Tensor, "row seq"]
    """int64 identity of each token, the same in every form of batches, see
    :func:`~mindspeed_simpo.batch_images.identities_of`, or ``NO_IDENTITY``; they stay in host memory."""
    packing: Packing | None = None
    """Set where one row holds all sequences; None where each sequence has its own row."""
    images: BatchImages | None = None
    """The images of the prompts, in host memory; None where the data set has none."""

    @property
    def num_pairs(self) -> int:
        """Pairs in this micro-batch, filler pairs included."""
        return self.pair_ids.numel()

    @property
    def response_tokens(self) -> Int[Tensor, " sequence"]:
        """int64 response tokens of each sequence."""
        return self.scored_places.sum(dim=1)

    @property
    def scored_places(self) -> Bool[Tensor, "sequence seq"]:
        """Whether a place in the row predicts a response token of a sequence."""
        scored = self.targets != IGNORE_INDEX
        if self.packing is None:
            return scored
        of_pair = self.packing.pair_of == torch.arange(self.num_pairs, device=scored.device)[:, None]
        return (scored[:, None] & of_pair).flatten(0, 1)

    def to(self, device: torch.device) -> PairBatch:
        """A copy with the tensors on ``device``."""
        return PairBatch(
            tokens=to_device(self.tokens, device),
            targets=to_device(self.targets, device),
            lengths=to_device(self.lengths, device),
            pair_ids=to_device(self.pair_ids, device),
            identities=self.identities,
            packing=self.packing.to(device) if self.packing is not None else None,
            images=self.images,
        )


def even_halves(chosen: Sequence[int], rejected: Sequence[int]) -> list[int]:
    """Divide the 2P sequences of P pairs into two halves, one sequence of each pair in each, of about equal length.

    Greedy: in descending order of the length difference within a pair, the longer sequence joins the half that has
    fewer tokens.

    Args:
        chosen: Tokens of each pair's chosen sequence.
        rejected: Tokens of each pair's rejected sequence.

    Returns:
        For each pair, the sequence in the first half: 0 for chosen, 1 for rejected.
    """
    sides = [0] * len(chosen)
    excess = 0
    differences = [one - other for one, other in zip(chosen, rejected, strict=True)]
    for pair in sorted(range(len(sides)), key=lambda pair: (-abs(differences[pair]), pair)):
        sides[pair] = int(excess * differences[pair] > 0)
        excess += differences[pair] * (1 - 2 * sides[pair])
    return sides


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; from host memory to an accelerator by a non-blocking copy from pinned memory."""
    if tensor.device == device or device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
