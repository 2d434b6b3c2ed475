"""The input rows of one forward, their slices on context-parallel ranks, and the halves of ``two_pass``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mindspeed_simpo.batch import (
    IGNORE_INDEX,
    UNPACKED,
    Documents,
    Packing,
    PairBatch,
    ScoredTokens,
    SequenceMembers,
    even_halves,
    to_device,
)
from mindspeed_simpo.batch_images import NO_IDENTITY, BatchImages
from mindspeed_simpo.model.dropout import token_keys
from mindspeed_simpo.parallel.context import positions_of


@dataclass(frozen=True)
class RowShard:
    """The slice of :class:`Rows` on one context-parallel rank; ``local`` = this rank's positions."""

    tokens: Int[Tensor, "row local"]
    position_ids: Int[Tensor, " local"] | Int[Tensor, "axis row local"]
    """int64 position of each token in its sequence; on several axes where the model rotates by places in images."""
    documents: Documents
    """Attention pattern of the full row."""
    scored: ScoredTokens
    """The response tokens that this rank's positions predict."""
    lengths: Int[Tensor, " row"] | None = None
    """int64 tokens of each full padded row without its padding; None for a packed row."""
    members: SequenceMembers | None = None
    """None where no loss of whole sequences is asked for."""
    token_keys: Int[Tensor, "row local"] | None = None
    """Keys of the tokens for dropout, see :func:`~mindspeed_simpo.model.dropout.token_keys`; None without dropout."""
    images: BatchImages | None = None
    """In host memory; None where the data set has none."""
    image_index: Int[Tensor, " image_token"] | None = None
    """int64 index of the feature of each image token among the local ones, row by row; None without images."""

    def to(self, device: torch.device) -> RowShard:
        """A copy with the tensors on ``device``."""
        optional: dict[str, Any] = {
            name: None if value is None else to_device(value, device)
            for name, value in (
                ("lengths", self.lengths),
                ("token_keys", self.token_keys),
                ("image_index", self.image_index),
            )
        }
        return dataclasses.replace(
            self,
            tokens=to_device(self.tokens, device),
            position_ids=to_device(self.position_ids, device),
            scored=self.scored.to(device),
            members=self.members.to(device) if self.members is not None else None,
            **optional,
        )


@dataclass(frozen=True)
class Rows:
    """Right-padded rows or one packed row, with targets, as in :class:`~mindspeed_simpo.batch.PairBatch`."""

    tokens: Int[Tensor, "row seq"]
    targets: Int[Tensor, "target_row seq"]
    identities: Int[Tensor, "row seq"]
    packing: Packing | None = None
    lengths: Int[Tensor, " row"] | None = None
    """int64 tokens of each padded row without its padding; None for a packed row."""
    images: BatchImages | None = None
    each_alone: bool = False
    """Whether each response token is scored as a sequence of its own, see :meth:`ScoredTokens.each_alone`."""

    @classmethod
    def of(cls, batch: PairBatch) -> Rows:
        """The rows of all sequences of ``batch``: chosen, then rejected."""
        lengths = batch.lengths if batch.packing is None else None
        return cls(batch.tokens, batch.targets, batch.identities, batch.packing, lengths, batch.images)

    def shard_of(
        self, context_rank: int, context_size: int, sequence_weight: float = 0.0, dropout_key: int | None = None
    ) -> RowShard:
        """The slice on one context-parallel rank.

        Args:
            context_rank: The rank.
            context_size: Number of context-parallel ranks; divides each document into ``2 * context_size`` chunks.
            sequence_weight: Factor of a loss of each sequence; 0 for none.
            dropout_key: Key of the step; None without dropout.
        """
        documents = self.packing.documents if self.packing is not None else UNPACKED
        lengths = documents.lengths or (self.tokens.shape[1],)
        local = positions_of(context_rank, context_size, lengths, self.tokens.device)
        packing = self.packing.at(local) if self.packing is not None else None
        identities, images = self.identities[:, local], self.images
        scored = ScoredTokens.of(self.targets[:, local], packing)
        if self.each_alone:
            scored = scored.each_alone(local, self.tokens.shape[1])
        positions = packing.positions if packing is not None else local
        if images is not None and images.positions is not None:
            positions = images.positions.at(identities)
        return RowShard(
            tokens=self.tokens[:, local],
            position_ids=positions,
            documents=documents,
            scored=scored,
            lengths=self.lengths,
            members=self._members(local, sequence_weight) if sequence_weight else None,
            token_keys=None if dropout_key is None else token_keys(identities, dropout_key),
            images=images,
            image_index=images.index_of(identities) if images is not None else None,
        )

    def _members(self, held: Int[Tensor, " held"], weight: float) -> SequenceMembers:
        of_token = torch.full((2, *self.tokens.shape), -1, dtype=torch.int64)
        if self.packing is None:
            assert self.lengths is not None, "padded rows have lengths"
            lengths = self.lengths
            for row, length in enumerate(lengths.tolist()):
                of_token[0, row, :length] = row
        else:
            lengths = self._mark_documents(of_token[:, 0], self.packing.documents)
        return SequenceMembers(of_token[:, :, held], lengths, weight)

    def _mark_documents(self, of_token: Int[Tensor, "2 seq"], documents: Documents) -> Int[Tensor, " sequence"]:
        """Set the sequences of the tokens of a packed row, whose padding has no target and no prefix.

        Returns:
            int64 tokens of each sequence.
        """
        scored = (self.targets != IGNORE_INDEX).any(dim=0)
        prefixes = [(0, 0)] * len(documents.wholes) + [branch[:2] for branch in documents.branches]
        lengths: list[int] = []
        start = 0
        for length, (prefix, prefix_length) in zip(documents.lengths, prefixes, strict=True):
            stop = start + length
            if prefix_length or scored[start:stop].any():
                of_token[0, start:stop] = len(lengths)
                of_token[1, prefix : prefix + prefix_length] = len(lengths)
                lengths.append(length + prefix_length)
            start = stop
        return torch.tensor(lengths, dtype=torch.int64)

    def halves(self) -> tuple[Rows, Rows]:
        """The chosen rows and the rejected rows; for padded rows only."""
        assert self.packing is None, "packed rows are divided by two_pass_halves"
        assert self.lengths is not None, "padded rows have lengths"
        tensors = self.tokens, self.targets, self.identities, self.lengths
        chosen, rejected = zip(*(tensor.chunk(2) for tensor in tensors), strict=True)
        return self._padded(*chosen), self._padded(*rejected)

    def _padded(self, tokens: Tensor, targets: Tensor, identities: Tensor, lengths: Tensor | None) -> Rows:
        return Rows(tokens, targets, identities, lengths=lengths, images=self.images)

    def two_pass_halves(self, lengths: Int[Tensor, " sequence"], multiple_of: int) -> tuple[Half, Half]:
        """Two halves for ``two_pass``, one sequence of each pair in each, trimmed to the longest row of the half.

        The first half of padded rows is chosen, the second is rejected. The halves of a packed row have chosen and
        rejected sequences, so that both have about the same number of tokens.

        Args:
            lengths: Tokens of each sequence without padding.
            multiple_of: The row length of each half is a multiple of this number, as that of ``self``.
        """
        chosen, rejected = lengths.view(2, -1).tolist()
        number = len(chosen)
        if self.packing is not None:
            first = [side * number + pair for pair, side in enumerate(even_halves(chosen, rejected))]
            second = [(sequence + number) % (2 * number) for sequence in first]
            starts = lengths.cumsum(0) - lengths
            spans = list(zip(starts.tolist(), lengths.tolist(), strict=True))
            return self._packed_half(first, spans, multiple_of), self._packed_half(second, spans, multiple_of)
        rows = [
            half.trimmed_to(_rounded(max(side), multiple_of))
            for half, side in zip(self.halves(), (chosen, rejected), strict=True)
        ]
        return Half(rows[0], torch.arange(number)), Half(rows[1], torch.arange(number, 2 * number))

    def _packed_half(self, sequences: list[int], spans: list[tuple[int, int]], multiple_of: int) -> Half:
        assert self.packing is not None
        assert not self.packing.documents.branches, "two_pass cannot divide sequences that share a prefix"
        number = self.packing.num_pairs
        wholes = [spans[sequence][1] for sequence in sequences]
        kept = torch.cat([torch.arange(start, start + length) for start, length in (spans[each] for each in sequences)])
        side = torch.tensor([sequence // number for sequence in sequences]).repeat_interleave(torch.tensor(wholes))
        documents = Documents(tuple(length for length in wholes if length))
        packing = Packing(documents, self.packing.positions[kept], self.packing.pair_of[kept], number)
        targets = self.targets[side, kept][None]
        rows = Rows(self.tokens[:, kept], targets, self.identities[:, kept], packing, images=self.images)
        return Half(rows.padded_to(_rounded(len(kept), multiple_of)), torch.tensor(sequences))

    def trimmed_to(self, length: int) -> Rows:
        """The first ``length`` positions of padded rows."""
        tokens, targets, identities = (each[:, :length] for each in (self.tokens, self.targets, self.identities))
        return self._padded(tokens, targets, identities, self.lengths)

    def padded_to(self, length: int) -> Rows:
        """The rows, padded further to ``length`` positions; the padding of a packed row is a document."""
        missing = length - self.tokens.shape[1]
        tensors = ((self.tokens, 0), (self.targets, IGNORE_INDEX), (self.identities, NO_IDENTITY))
        tokens, targets, identities = (
            torch.nn.functional.pad(tensor, (0, missing), value=value) for tensor, value in tensors
        )
        packing = self.packing.with_padding(missing) if self.packing is not None else None
        return Rows(tokens, targets, identities, packing, self.lengths, self.images, self.each_alone)


@dataclass(frozen=True)
class Half:
    """Rows with one sequence of each pair."""

    rows: Rows
    sequences: Int[Tensor, " pair"]
    """int64 index of the sequence in the micro-batch (chosen 0..P-1, then rejected P..2P-1), for each pair."""


def _rounded(length: int, multiple_of: int) -> int:
    return -(-max(1, length) // multiple_of) * multiple_of
