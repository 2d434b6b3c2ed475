"""Sequences without their pairing: what one forward of the model takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mindspeed_simpo.batch import IGNORE_INDEX, ONE_A_ROW, Documents, Packing, PairBatch, ScoredTokens, moved
from mindspeed_simpo.parallel.context import positions_of


@dataclass(frozen=True)
class HeldRows:
    """What the model of one context-parallel rank takes."""

    tokens: Int[Tensor, "row held"]
    position_ids: Int[Tensor, " held"]
    """Place of each token in its sequence."""
    documents: Documents
    """What attends to what."""
    scored: ScoredTokens

    def to(self, device: torch.device) -> HeldRows:
        """On ``device``."""
        tokens, position_ids = moved(self.tokens, device), moved(self.position_ids, device)
        return HeldRows(tokens, position_ids, self.documents, self.scored.to(device))


@dataclass(frozen=True)
class Rows:
    """Right-padded sequences, or one row that packs them, and their targets, as in ``batch.PairBatch``."""

    tokens: Int[Tensor, "row seq"]
    targets: Int[Tensor, "target_row seq"]
    packing: Packing | None = None

    @classmethod
    def of(cls, batch: PairBatch) -> Rows:
        """All sequences: chosen, then rejected."""
        return cls(batch.tokens, batch.targets, batch.packing)

    def held_by(self, context_rank: int, context_size: int) -> HeldRows:
        """What one context-parallel rank holds of them."""
        held = positions_of(context_rank, context_size, self.tokens.shape[1], self.tokens.device)
        return HeldRows(
            tokens=self.tokens[:, held],
            position_ids=self.packing.positions[held] if self.packing is not None else held,
            documents=self.packing.documents if self.packing is not None else ONE_A_ROW,
            scored=ScoredTokens.of(self.targets[:, held], self.packing),
        )

    def halves(self) -> tuple[Rows, Rows]:
        """Chosen rows, rejected rows; of padded rows only."""
        assert self.packing is None, "packed rows are cut by trimmed_halves"
        (chosen, rejected), (chosen_targets, rejected_targets) = self.tokens.chunk(2), self.targets.chunk(2)
        return Rows(chosen, chosen_targets), Rows(rejected, rejected_targets)

    def trimmed_halves(self, lengths: Int[Tensor, " sequence"], multiple_of: int) -> tuple[Rows, Rows]:
        """Chosen sequences, rejected sequences, each without the padding that only the other one needs.

        Args:
            lengths: Tokens of each sequence without padding.
            multiple_of: What the length of a half must be a multiple of; the length of ``self`` is.
        """
        by_side = lengths.view(2, -1)
        if self.packing is not None:
            chosen_end, end = by_side.sum(dim=1).cumsum(dim=0).tolist()
            return self._packed_part(0, 0, chosen_end, multiple_of), self._packed_part(1, chosen_end, end, multiple_of)
        chosen, rejected = (
            half.trimmed_to(_rounded(int(longest), multiple_of))
            for half, longest in zip(self.halves(), by_side.amax(dim=1).tolist(), strict=True)
        )
        return chosen, rejected

    def _packed_part(self, side: int, start: int, end: int, multiple_of: int) -> Rows:
        assert self.packing is not None
        assert not self.packing.documents.branches, "what shares a prompt cannot pass one after the other"
        padding = _rounded(end - start, multiple_of) - (end - start)
        wholes, place = [], 0
        for length in self.packing.documents.wholes:
            if start <= place < end:
                wholes.append(length)
            place += length
        pad = torch.nn.functional.pad
        packing = Packing(
            Documents((*wholes, padding) if padding else tuple(wholes)),
            pad(self.packing.positions[start:end], (0, padding)),
            pad(self.packing.pair_of[start:end], (0, padding)),
            self.packing.num_pairs,
        )
        tokens, targets = self.tokens[:, start:end], self.targets[side : side + 1, start:end]
        return Rows(pad(tokens, (0, padding)), pad(targets, (0, padding), value=IGNORE_INDEX), packing)

    def trimmed_to(self, length: int) -> Rows:
        """The first ``length`` positions of padded rows."""
        return Rows(self.tokens[:, :length], self.targets[:, :length])

    def padded_to(self, length: int) -> Rows:
        """Padded rows with more padding, to ``length`` positions."""
        missing = length - self.tokens.shape[1]
        return Rows(
            torch.nn.functional.pad(self.tokens, (0, missing)),
            torch.nn.functional.pad(self.targets, (0, missing), value=IGNORE_INDEX),
        )


def _rounded(length: int, multiple_of: int) -> int:
    return -(-max(1, length) // multiple_of) * multiple_of
