"""The images of a micro-batch, and the identities of tokens, by which every form of batches finds their features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

NO_IDENTITY = -1
"""Identity of padding."""
_PART_BITS, _NUMBER_BITS = 2, 28


def identities_of(pair_id: int, part: int, number: int) -> Int[Tensor, " token"]:
    """Identities of the first tokens of a part of a pair: the same for a prompt that two sequences have.

    Args:
        pair_id: Index of the example in the data set.
        part: 0 for the prompt, 1 for the chosen and 2 for the rejected response.
        number: Number of tokens, at most ``2 ** 28``.
    """
    return (((pair_id << _PART_BITS) + part) << _NUMBER_BITS) + torch.arange(number, dtype=torch.int64)


@dataclass(frozen=True)
class PromptPositions:
    """Rotary positions of prompts with images, on several axes; a response continues them on all axes alike."""

    pair_ids: Int[Tensor, " pair"]
    """int64 index of each pair in the data set, ascending."""
    starts: Int[Tensor, " pair"]
    """int64 index of each prompt's first token in ``of_prompts``."""
    of_prompts: Int[Tensor, "axis token"]
    """int64 positions of the tokens of all prompts, end to end."""
    after: Int[Tensor, " pair"]
    """int64 position of the first token of each pair's responses, on all axes."""

    @classmethod
    def of(cls, pair_ids: Sequence[int], prompts: Sequence[Int[Tensor, "axis _"]]) -> PromptPositions:
        """Join the positions of prompts; responses follow the largest position.

        Args:
            pair_ids: Index of each pair in the data set.
            prompts: int64 positions of each pair's prompt.
        """
        order = sorted(range(len(pair_ids)), key=lambda index: pair_ids[index])
        lengths = torch.tensor([prompts[index].shape[1] for index in order])
        return cls(
            torch.tensor([pair_ids[index] for index in order], dtype=torch.int64),
            lengths.cumsum(0) - lengths,
            torch.cat([prompts[index] for index in order], dim=1),
            torch.tensor([int(prompts[index].max()) + 1 if prompts[index].numel() else 0 for index in order]),
        )

    def at(self, identities: Int[Tensor, "row seq"]) -> Int[Tensor, "axis row seq"]:
        """Positions of tokens; 0 for padding.

        Args:
            identities: Of the tokens, of pairs that this record has.
        """
        number = identities & ((1 << _NUMBER_BITS) - 1)
        part = (identities >> _NUMBER_BITS) & ((1 << _PART_BITS) - 1)
        pair = torch.searchsorted(self.pair_ids, identities >> (_NUMBER_BITS + _PART_BITS))
        pair = pair.clamp(max=len(self.pair_ids) - 1)
        in_prompt = part == 0
        prompt = self.of_prompts[:, torch.where(in_prompt, self.starts[pair] + number, 0)]
        positions = torch.where(in_prompt, prompt, self.after[pair] + number)
        return torch.where(identities == NO_IDENTITY, 0, positions)


@dataclass(frozen=True, eq=False)
class BatchImages:
    """The images of a micro-batch's pairs, in host memory; equal to itself only, so that it can be a key.

    The vision tower makes of ``inputs`` one feature for each entry of ``tokens``, in that order.
    """

    inputs: Mapping[str, Tensor]
    """What the image processor gives the model, by its names (``pixel_values``, ...), of all images."""
    tokens: Int[Tensor, " feature"]
    """int64 identity of the prompt token that each feature takes the place of; empty where ``inputs`` are those of a
    blank image, which keeps the ranks of a sharded vision tower together."""
    positions: PromptPositions | None = None
    """Of all pairs; None where positions count the tokens of a sequence."""
    _sorted: tuple[Tensor, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ascending, order = self.tokens.sort()
        object.__setattr__(self, "_sorted", (ascending, order))

    def index_of(self, identities: Int[Tensor, "row seq"]) -> Int[Tensor, " image_token"]:
        """Index of the feature of each image token, row by row: both sequences of a pair have the same features.

        Args:
            identities: Of some tokens.
        """
        ascending, order = self._sorted
        if not len(order):
            return order
        flat = identities.flatten()
        place = torch.searchsorted(ascending, flat).clamp(max=len(ascending) - 1)
        found: Bool[Tensor, " token"] = ascending[place] == flat
        return order[place[found]]
