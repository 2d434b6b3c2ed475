"""How one rank's pairs of a global batch become micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindspeed_simpo.batch import PairBatch, TokenizedPair
from mindspeed_simpo.config import BatchingName, Config
from mindspeed_simpo.data.collate import COLLATE, shared_length


@dataclass(frozen=True)
class Batching:
    """The options that say how pairs share micro-batches."""

    name: BatchingName
    micro_batch_size: int
    """Pairs of a micro-batch where each sequence has a row of its own."""
    max_tokens: int
    """Tokens up to which a micro-batch is filled where its sequences share a row."""
    multiple_of: int = 1
    """What the length of a row is a multiple of."""

    @classmethod
    def of(cls, config: Config) -> Batching:
        """As configured."""
        return cls(config.batching, config.micro_batch_size, config.token_budget, config.sequence_multiple)

    def micro_batches(self, pairs: Sequence[TokenizedPair | None], pair_ids: Sequence[int]) -> list[PairBatch]:
        """Micro-batches of one rank's pairs of a global batch; a function of these pairs alone.

        ``padded`` takes ``micro_batch_size`` after ``micro_batch_size``. The packed forms fill micro-batches by
        :func:`fill`: their number depends on the lengths, and may be another on each data-parallel rank.

        Args:
            pairs: At least one; ``None`` is a filler pair.
            pair_ids: Row number of each pair in the dataset.
        """
        if self.name == "padded":
            size = self.micro_batch_size
            parts = [list(range(first, min(first + size, len(pairs)))) for first in range(0, len(pairs), size)]
        else:
            parts = fill([self.size_of(pair) for pair in pairs], self.max_tokens // self.multiple_of * self.multiple_of)
        return [
            COLLATE[self.name](
                [pairs[index] for index in part], [pair_ids[index] for index in part], multiple_of=self.multiple_of
            )
            for part in parts
        ]

    def size_of(self, pair: TokenizedPair | None) -> int:
        """Tokens that a pair adds to a packed row."""
        if pair is None:
            return 0
        return shared_length(pair) + (len(pair.prompt_ids) if self.name == "packed" else 0)


def fill(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Put every item into the first bin that has room for it, the largest first; one above the capacity has its own.

    Args:
        sizes: Of the items, each at least 0.
        capacity: Of a bin.

    Returns:
        The items of each bin by number, ascending; the bins by their first item.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        place = next((number for number, left in enumerate(room) if sizes[item] <= left), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(capacity)
        bins[place].append(item)
        room[place] -= sizes[item]
    return sorted(sorted(members) for members in bins)
