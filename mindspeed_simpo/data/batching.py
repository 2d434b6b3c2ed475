"""How the pairs of a global batch are dealt to ranks, and one rank's pairs become micro-batches."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from mindspeed_simpo.batch import PairBatch, TokenizedPair
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.options import BatchingName
from mindspeed_simpo.data.collate import COLLATE


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
        return cls(config.batching_in_use, config.micro_batch_size, config.token_budget, config.sequence_multiple)

    def deal(self, sizes: Sequence[int], ranks: int) -> list[list[int]]:
        """Which pairs of a global batch each data-parallel rank gets; the same on every rank.

        ``padded`` deals ``micro_batch_size`` after ``micro_batch_size`` in turn. The packed forms deal by
        :func:`spread`, so that the ranks, which wait for each other after every step, have about equally many tokens.

        Args:
            sizes: Of each pair of the global batch, see :meth:`size_of`; 0 for a filler.
            ranks: Data-parallel ranks; no more than pairs.

        Returns:
            The numbers of each rank's pairs, ascending.
        """
        if self.name == "padded":
            turns = [index // self.micro_batch_size % ranks for index in range(len(sizes))]
            return [[index for index, turn in enumerate(turns) if turn == rank] for rank in range(ranks)]
        return spread(sizes, ranks)

    def micro_batches(self, pairs: Sequence[TokenizedPair | None], pair_ids: Sequence[int]) -> list[PairBatch]:
        """Micro-batches of one rank's pairs of a global batch; a function of these pairs alone.

        ``padded`` takes ``micro_batch_size`` after ``micro_batch_size``. The packed forms fill micro-batches by
        :func:`fill`: their number depends on the lengths, and may be another on each data-parallel rank.

        Args:
            pairs: At least one; ``None`` is a filler pair.
            pair_ids: Row number of each pair in the dataset.
        """
        return [
            COLLATE[self.name](
                [pairs[index] for index in part], [pair_ids[index] for index in part], multiple_of=self.multiple_of
            )
            for part in self.parts([self.size_of_pair(pair) for pair in pairs])
        ]

    def parts(self, sizes: Sequence[int]) -> list[list[int]]:
        """The pairs of each micro-batch of one rank, by number; ``sizes`` of its pairs, see :meth:`size_of`."""
        if self.name == "padded":
            size, number = self.micro_batch_size, len(sizes)
            return [list(range(first, min(first + size, number))) for first in range(0, number, size)]
        return fill(sizes, self.max_tokens // self.multiple_of * self.multiple_of)

    def size_of(self, prompt: int, chosen: int, rejected: int) -> int:
        """Tokens that a pair of these lengths adds to a packed row."""
        return prompt * (2 if self.name == "packed" else 1) + chosen + rejected

    def size_of_pair(self, pair: TokenizedPair | None) -> int:
        """:meth:`size_of` a pair; 0 for a filler."""
        return 0 if pair is None else self.size_of(*pair.lengths)


def spread(sizes: Sequence[int], bins: int) -> list[list[int]]:
    """Put every item into the bin that has least, the largest item first; where several have, the one of fewest items.

    Args:
        sizes: Of the items, each at least 0.
        bins: Their number; none stays empty where there are enough items.

    Returns:
        The items of each bin by number, ascending.
    """
    members: list[list[int]] = [[] for _ in range(bins)]
    load = [(0, 0, number) for number in range(bins)]
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        size, count, number = load[0]
        members[number].append(item)
        heapq.heapreplace(load, (size + sizes[item], count + 1, number))
    return [sorted(items) for items in members]


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
