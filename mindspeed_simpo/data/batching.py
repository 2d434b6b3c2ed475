"""From the pairs of a global batch to the pairs of each data-parallel rank, and from these to micro-batches."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from mindspeed_simpo.batch import FILLER_PAIR, PairBatch, TokenizedPair
from mindspeed_simpo.config.options import BatchingForm
from mindspeed_simpo.data.collate import COLLATE
from mindspeed_simpo.data.pixels import ImageInputs


@runtime_checkable
class BatchingOptions(Protocol):
    """What :meth:`Batching.of` reads of a configuration."""

    @property
    def batching_in_use(self) -> BatchingForm:
        """``batching`` with ``auto`` resolved."""

    @property
    def micro_batch_size(self) -> int:
        """See :class:`Batching`."""

    @property
    def token_budget(self) -> int:
        """``max_tokens`` of :class:`Batching`."""

    @property
    def sequence_multiple(self) -> int:
        """``multiple_of`` of :class:`Batching`."""

    @property
    def micro_batch_multiple(self) -> int:
        """``number_multiple_of`` of :class:`Batching`."""

    @property
    def equal_micro_batches(self) -> bool:
        """See :class:`Batching`."""


@dataclass(frozen=True)
class Batching:
    """How pairs share micro-batches."""

    name: BatchingForm
    micro_batch_size: int
    """Pairs of a micro-batch where each sequence has a row of its own."""
    max_tokens: int
    """Tokens up to which a micro-batch is filled where its sequences share a row."""
    multiple_of: int = 1
    """The length of each row is rounded up to a multiple of this number of tokens."""
    number_multiple_of: int = 1
    """The number of a rank's micro-batches is rounded up to a multiple of this number; packed forms only."""
    equal_micro_batches: bool = False
    """Whether filler micro-batches make their number the same on all data-parallel ranks."""

    @classmethod
    def of(cls, options: BatchingOptions) -> Batching:
        """The batching that a configuration asks for."""
        return cls(
            options.batching_in_use,
            options.micro_batch_size,
            options.token_budget,
            options.sequence_multiple,
            options.micro_batch_multiple,
            options.equal_micro_batches,
        )

    def deal(self, sizes: Sequence[int], ranks: int) -> list[list[int]]:
        """Which pairs of a global batch each data-parallel rank gets; every rank computes the same answer.

        ``padded`` gives ``micro_batch_size`` pairs to each rank in turn. The packed forms use :func:`spread`, so that
        the ranks, which wait for each other in the gradient reduction of every step, have about equally many tokens.

        Args:
            sizes: Tokens of each pair of the global batch, see :meth:`size_of`; 0 for a filler.
            ranks: Number of data-parallel ranks, at most the number of pairs.

        Returns:
            The indices of each rank's pairs, ascending.
        """
        if self.name == "padded":
            dealt: list[list[int]] = [[] for _ in range(ranks)]
            for index in range(len(sizes)):
                dealt[index // self.micro_batch_size % ranks].append(index)
            return dealt
        return spread(sizes, ranks)

    def number_of_micro_batches(self, sizes: Sequence[int], dealt: Sequence[Sequence[int]]) -> int:
        """The least number of micro-batches of each data-parallel rank for a global batch.

        Args:
            sizes: As for :meth:`deal`.
            dealt: The pairs of each rank, from :meth:`deal`.
        """
        if not self.equal_micro_batches:
            return 0
        return max(len(self.parts([sizes[index] for index in own])) for own in dealt)

    def micro_batches(
        self,
        pairs: Sequence[TokenizedPair | None],
        pair_ids: Sequence[int],
        at_least: int = 0,
        images: ImageInputs | None = None,
    ) -> list[PairBatch]:
        """Micro-batches of one rank's pairs of a global batch; a function of these pairs alone.

        ``padded`` puts ``micro_batch_size`` consecutive pairs into each micro-batch. The packed forms use :func:`fill`:
        the number of micro-batches depends on the lengths, and data-parallel ranks may differ in it.

        Args:
            pairs: At least one; ``None`` is a filler pair.
            pair_ids: Index of each pair in the data set.
            at_least: Micro-batches of a filler pair make up this number.
            images: Gives each micro-batch its images; ``None`` for a data set without images.

        Raises:
            DataError: see :meth:`~mindspeed_simpo.data.pixels.ImageInputs.of`.
        """
        parts = self.parts([self.size_of_pair(pair) for pair in pairs])
        parts += [[]] * (at_least - len(parts))
        contents = [
            ([pairs[index] for index in part] or [None], [pair_ids[index] for index in part] or [FILLER_PAIR])
            for part in parts
        ]
        batches = [COLLATE[self.name](*content, multiple_of=self.multiple_of) for content in contents]
        if images is None:
            return batches
        return [
            dataclasses.replace(batch, images=images.of(*content))
            for batch, content in zip(batches, contents, strict=True)
        ]

    def parts(self, sizes: Sequence[int]) -> list[list[int]]:
        """The indices of the pairs of each micro-batch of one rank, from the :meth:`size_of` of each of its pairs.

        Where the number of the packed forms has to be rounded up, the fullest micro-batches are divided; a micro-batch
        without a pair is added where none holds two.
        """
        if self.name == "padded":
            size, number = self.micro_batch_size, len(sizes)
            return [list(range(first, min(first + size, number))) for first in range(0, number, size)]
        parts = fill(sizes, self.max_tokens // self.multiple_of * self.multiple_of)
        while len(parts) % self.number_multiple_of:
            fullest = max(parts, key=lambda part: (len(part) > 1, sum(sizes[index] for index in part)))
            halves = [[fullest[half] for half in side] for side in spread([sizes[index] for index in fullest], 2)]
            place = parts.index(fullest)
            parts[place : place + 1] = halves
        return parts

    def size_of(self, prompt: int, chosen: int, rejected: int) -> int:
        """Tokens that a pair with these numbers of tokens adds to a packed row."""
        return prompt * (2 if self.name == "packed" else 1) + chosen + rejected

    def size_of_pair(self, pair: TokenizedPair | None) -> int:
        """:meth:`size_of` of a pair; 0 for a filler pair."""
        return 0 if pair is None else self.size_of(*pair.lengths)


def spread(sizes: Sequence[int], bins: int) -> list[list[int]]:
    """Greedy balancing: in descending size, each item goes to the bin of smallest total, of fewest items among equals.

    Args:
        sizes: Of the items, each at least 0.
        bins: Number of bins; no bin stays empty where there are at least as many items.

    Returns:
        The indices of each bin's items, ascending.
    """
    members: list[list[int]] = [[] for _ in range(bins)]
    load = [(0, 0, number) for number in range(bins)]
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        size, count, number = load[0]
        members[number].append(item)
        heapq.heapreplace(load, (size + sizes[item], count + 1, number))
    return [sorted(items) for items in members]


def fill(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: in descending size, each item goes to the first bin with room for it, else to a new bin.

    An item above the capacity has a bin of its own.

    Args:
        sizes: Of the items, each at least 0.
        capacity: Of each bin.

    Returns:
        The indices of each bin's items, ascending; the bins in the order of their first items.
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
