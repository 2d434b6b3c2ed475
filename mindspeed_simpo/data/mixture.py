"""How many pairs of each source an epoch has, and in which order: exact counts, a function of the seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate

import numpy as np
from jaxtyping import Bool, Int, Int64

from mindspeed_simpo.config.options import DataSource
from mindspeed_simpo.errors import DataError


@dataclass(frozen=True)
class Mixture:
    """Sources whose pairs are numbered end to end, and the number of pairs of each that an epoch has.

    Each source is an endless stream: pass after pass over its pairs, each pass in an order that ``(seed, pass,
    source)`` seeds. Epoch ``e`` has the pairs ``e * used`` to ``(e + 1) * used - 1`` of the stream of each source, in
    this order; which source is next is shuffled anew in each epoch. So at no time has a pair of a source been drawn
    two times more than another one.

    Where every source gives all of its pairs once, an epoch is a shuffle of all pairs, as of a single source.
    """

    found: tuple[int, ...]
    """Pairs of each source."""
    used: tuple[int, ...]
    """Pairs of each source in an epoch."""

    @classmethod
    def of_all(cls, *found: int) -> Mixture:
        """Every source gives all of its pairs once."""
        return cls(found, found)

    @classmethod
    def of(cls, sources: Sequence[DataSource], found: Sequence[int]) -> Mixture:
        """The mixture that the keys ``weight`` and ``pairs`` of sources ask for.

        A source with ``pairs`` gives as many, one without a number all of its pairs. Sources with a weight together
        give as many pairs as they have: with ``N`` the sum of their pairs, a source gives ``N * weight / (sum of
        weights)``, rounded down, and the pairs that this leaves go one by one to the largest remainders, among equal
        ones to the first.

        Raises:
            DataError: where a source with a number has no pair, or a weight is too small for one.
        """
        used = list(found)
        for number, source in enumerate(sources):
            if source.pairs is not None:
                used[number] = source.pairs
            if not found[number] and (source.pairs is not None or source.weight is not None):
                raise DataError(f"data_path[{number}]: no pair of {source.name} ({source.path}) is left to draw from")
        weights = {number: source.weight for number, source in enumerate(sources) if source.weight is not None}
        for number, share in zip(weights, _shares(sum(found[i] for i in weights), [*weights.values()]), strict=True):
            if not share:
                raise DataError(
                    f"data_path[{number}].weight: {weights[number]:g} gives {sources[number].name} no pair of an epoch "
                    f"of {sum(found[i] for i in weights)}: raise it, give `pairs`, or leave the source out"
                )
            used[number] = share
        return cls(tuple(found), tuple(used))

    @property
    def pairs(self) -> int:
        """Pairs of an epoch."""
        return sum(self.used)

    @property
    def is_whole(self) -> bool:
        """Whether every source gives all of its pairs once."""
        return self.used == self.found

    @property
    def has_one_source(self) -> bool:
        """Whether there is only one source."""
        return len(self.found) == 1

    @cached_property
    def starts(self) -> list[int]:
        """Number of the first pair of each source, then the number of all pairs."""
        return [0, *accumulate(self.found)]

    def __str__(self) -> str:
        return ", ".join(f"{used} of {found}" for used, found in zip(self.used, self.found, strict=True))

    def epoch_order(self, seed: int | None, epoch: int) -> Int64[np.ndarray, " pair"]:
        """Numbers of the pairs of an epoch in training order; without a seed in the order of the data."""
        if self.is_whole:
            return shuffled(self.pairs, *_entropy(seed, epoch))
        places = np.repeat(np.arange(len(self.used), dtype=np.int32), self.used)
        _shuffle(places, *_entropy(seed, epoch))
        order = np.empty(self.pairs, np.int64)
        for source, used in enumerate(self.used):
            order[places == source] = self._drawn(source, seed, epoch * used, (epoch + 1) * used)
        return order

    def held_out_without(self, dropped: Bool[np.ndarray, " pair"]) -> Mixture:
        """The mixture of held-out sources, each pair at most once, without some of the pairs."""
        found = [int(np.count_nonzero(~part)) for part in np.split(dropped, self.starts[1:-1])]
        return Mixture(tuple(found), tuple(map(min, self.used, found)))

    def of_first_epoch(self, source: int, seed: int | None) -> Int64[np.ndarray, " pair"]:
        """Numbers of the pairs of a source in the first epoch, those that are drawn several times as often."""
        if self.is_whole:
            return self.starts[source] + np.arange(self.found[source])
        return self._drawn(source, seed, 0, self.used[source])

    def distinct(self, seed: int | None, first_epoch: int, last_epoch: int) -> Int64[np.ndarray, " pair"]:
        """Ascending numbers of the distinct pairs of the epochs ``first_epoch`` to ``last_epoch - 1``."""
        distinct = [np.arange(0)]
        for source, (found, used) in enumerate(zip(self.found, self.used, strict=True)):
            first, last = first_epoch * used, last_epoch * used
            next_pass = first + -first % max(found, 1)
            if last >= next_pass + found:
                distinct.append(self.starts[source] + np.arange(found))
            else:
                distinct.append(np.unique(self._drawn(source, seed, first, last)))
        return np.concatenate(distinct)

    def _drawn(self, source: int, seed: int | None, first: int, last: int) -> Int64[np.ndarray, " pair"]:
        """Numbers of the pairs ``first`` to ``last - 1`` of the stream of a source."""
        found, start = self.found[source], self.starts[source]
        drawn = [np.arange(0)]
        while first < last:
            number, place = divmod(first, found)
            drawn.append(start + shuffled(found, *_entropy(seed, number, source + 1))[place : place + last - first])
            first += len(drawn[-1])
        return np.concatenate(drawn)


def shuffled(size: int, *entropy: int) -> Int64[np.ndarray, " pair"]:
    """``0 .. size - 1`` in an order that is a function of ``entropy``; ascending without any."""
    ids = np.arange(size)
    _shuffle(ids, *entropy)
    return ids


def _shuffle(values: Int[np.ndarray, " pair"], *entropy: int) -> None:
    if entropy:
        # numpy guarantees the streams of RandomState across versions, those of Generator not; resumed runs need them.
        sequence = np.random.SeedSequence(entropy)
        np.random.RandomState(np.random.MT19937(sequence)).shuffle(values)


def _entropy(seed: int | None, *numbers: int) -> tuple[int, ...]:
    return () if seed is None else (seed, *numbers)


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` divided in proportion to weights, in whole numbers, by the method of largest remainders."""
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is a tenth
    wanted = [total * weight / sum(exact) for weight in exact]
    shares = [int(share) for share in wanted]
    by_remainder = sorted(range(len(shares)), key=lambda number: (shares[number] - wanted[number], number))
    for number in by_remainder[: total - sum(shares)]:
        shares[number] += 1
    return shares
