"""Sequences without their pairing: what one forward of the model takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mindspeed_simpo.batch import IGNORE_INDEX, PairBatch


@dataclass(frozen=True)
class Rows:
    """Right-padded sequences and their targets, as in :class:`~mindspeed_simpo.batch.PairBatch`."""

    tokens: Int[Tensor, "row seq"]
    targets: Int[Tensor, "row seq"]

    @classmethod
    def of(cls, batch: PairBatch) -> Rows:
        """All rows: chosen, then rejected."""
        return cls(batch.tokens, batch.targets)

    def halves(self) -> tuple[Rows, Rows]:
        """Chosen rows, rejected rows."""
        (chosen, rejected), (chosen_targets, rejected_targets) = self.tokens.chunk(2), self.targets.chunk(2)
        return Rows(chosen, chosen_targets), Rows(rejected, rejected_targets)

    def trimmed_halves(self, lengths: Int[Tensor, " row"], multiple_of: int) -> tuple[Rows, Rows]:
        """:meth:`halves`, each without the padding that only the other one needs.

        Args:
            lengths: Tokens of each row without padding.
            multiple_of: What the length of a half must be a multiple of; the length of ``self`` is.
        """
        chosen, rejected = (
            half.trimmed_to(-(-max(1, int(longest)) // multiple_of) * multiple_of)
            for half, longest in zip(self.halves(), lengths.view(2, -1).amax(dim=1).tolist(), strict=True)
        )
        return chosen, rejected

    def trimmed_to(self, length: int) -> Rows:
        """The first ``length`` positions."""
        return Rows(self.tokens[:, :length], self.targets[:, :length])

    def padded_to(self, length: int) -> Rows:
        """Padded further, to ``length`` positions."""
        missing = length - self.tokens.shape[1]
        return Rows(
            torch.nn.functional.pad(self.tokens, (0, missing)),
            torch.nn.functional.pad(self.targets, (0, missing), value=IGNORE_INDEX),
        )

    def to(self, device: torch.device) -> Rows:
        """On ``device``."""
        return Rows(self.tokens.to(device), self.targets.to(device))
