"""The largest pass of a run through its model, in tokens, from the lengths of its pairs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from mindspeed_simpo.batch import even_halves
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.config.options import TrainingOptions
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.loader import PairStream
from mindspeed_simpo.data.mixture import Mixture

SIMULATED_PAIRS = 200_000
"""Pairs of the run, from its start, whose micro-batches are computed."""


class PassShape(NamedTuple):
    """The input of one forward of a rank's model: a micro-batch, or with ``two_pass`` one half of a micro-batch."""

    tokens: int
    """Of all rows, padding included."""
    rows: int
    scored: int
    """Response tokens."""
    prefixes: int = 0
    """Prompt tokens that a branch attends to again; 0 without ``batching: prefix_shared``, like the fields below."""
    branch_tokens: int = 0
    """Tokens of all branches."""
    longest_branch: int = 0
    """Tokens of the longest branch with its prefix."""


class RunPass(NamedTuple):
    """A pass and the documents that its attention computes."""

    shape: PassShape
    wholes: Int[np.ndarray, " document"]
    """Tokens of each sequence that attends to itself alone, padding of padded rows included."""
    branches: Int[np.ndarray, "branch 2"]
    """Tokens of the prefix that a branch attends to, and of the branch."""


@dataclass(frozen=True)
class DealtStep:
    """The pairs of a global batch, fillers included, and which of them each data-parallel rank has."""

    pairs: Int[np.ndarray, "pair 3"]
    """Tokens of prompt, chosen and rejected response."""
    sizes: Sequence[int]
    """:meth:`Batching.size_of` of each pair."""
    dealt: Sequence[Sequence[int]]
    """Indices of the pairs of each rank."""
    batching: Batching
    two_pass: bool

    def passes_of(self, rank: int) -> list[RunPass]:
        """The passes of a data-parallel rank, in their order."""
        own = self.dealt[rank]
        parts = self.batching.parts([self.sizes[index] for index in own])
        pairs = self.pairs[own]
        return [each for part in parts for each in _passes(pairs[part], self.batching, two_pass=self.two_pass)]


@dataclass(frozen=True)
class LargestPass:
    """The largest pass of any data-parallel rank, and what several passes together need."""

    shape: PassShape
    """Each number is a maximum by itself; the maxima may belong to different passes."""
    in_flight: tuple[int, ...]
    """Largest sum of tokens of one, two and so on consecutive passes, up to the number of pipeline ranks."""
    passes: int
    """Largest number of passes of one step."""


def largest_pass(
    lengths: Int[np.ndarray, "pair 3"],
    options: TrainingOptions,
    batching: Batching,
    layout: Layout,
    mixture: Mixture | None = None,
) -> LargestPass:
    """Divide the pairs of a run as :class:`~mindspeed_simpo.data.loader.PairLoader` does, and keep the largest numbers.

    One epoch is computed: later epochs have the same pairs in another order, or pairs of the same sources.

    Args:
        lengths: Tokens of prompt, chosen and rejected response of every pair; at least one pair.
        options: ``global_batch_size``, ``train_iters``, ``seed`` and ``pair_schedule`` of the run.
        batching: Of the run.
        layout: Of the run.
        mixture: Of the sources of the pairs; ``None`` for all pairs.
    """
    found = [
        [each.shape for each in step.passes_of(rank)]
        for step in steps_of_run(lengths, options, batching, layout.data, SIMULATED_PAIRS, mixture)
        for rank in range(layout.data)
    ]
    return largest_of(found, layout.pipeline)


def largest_of(steps: Sequence[Sequence[PassShape]], pipeline: int) -> LargestPass:
    """The largest numbers of some steps' passes, each of one data-parallel rank.

    Args:
        steps: The passes of each step, at least one.
        pipeline: Number of pipeline ranks.
    """
    shapes = [shape for passes in steps for shape in passes]
    return LargestPass(
        shape=PassShape(*map(max, zip(*shapes, strict=True))),
        in_flight=tuple(max(map(_window(number), steps)) for number in range(1, pipeline + 1)),
        passes=max(map(len, steps)),
    )


def steps_of_run(
    lengths: Int[np.ndarray, "pair 3"],
    options: TrainingOptions,
    batching: Batching,
    data_ranks: int,
    most_pairs: int,
    mixture: Mixture | None = None,
) -> Iterator[DealtStep]:
    """The steps of a run from its start, at most one epoch, with their pairs dealt to the data-parallel ranks.

    Args:
        lengths: As in :func:`largest_pass`.
        options: As in :func:`largest_pass`.
        batching: Of the run.
        data_ranks: Number of data-parallel ranks.
        most_pairs: Number of pairs after which no further step begins.
        mixture: As in :func:`largest_pass`.
    """
    size = options.global_batch_size
    stream = PairStream(mixture or Mixture.of_all(len(lengths)), options.seed)
    epoch = stream.steps_per_epoch(size)
    for step in range(min(options.train_iters or epoch, epoch, -(-most_pairs // size))):
        taken = lengths[stream.take(stream.consumed_pairs(step, size), size)]
        pairs = np.concatenate([taken, np.zeros((size - len(taken), 3), taken.dtype)])  # filler pairs
        sizes = [batching.size_of(*row) for row in pairs.tolist()]
        yield DealtStep(pairs, sizes, batching.deal(sizes, data_ranks), batching, options.pair_schedule == "two_pass")


def _window(number: int) -> Callable[[Sequence[PassShape]], int]:
    """The largest sum of tokens of ``number`` consecutive passes, as a function of the passes of one step."""

    def largest(passes: Sequence[PassShape]) -> int:
        tokens = [each.tokens for each in passes]
        return max(sum(tokens[start : start + number]) for start in range(max(1, len(tokens) - number + 1)))

    return largest


_NO_BRANCHES = np.zeros((0, 2), dtype=np.int64)


def _passes(pairs: Int[np.ndarray, "part 3"], batching: Batching, *, two_pass: bool) -> Iterator[RunPass]:
    """The passes of the pairs of one micro-batch."""
    prompt, *sides = pairs.T
    if batching.name == "prefix_shared":
        responses, prompts, rejected = int(sum(sides).sum()), int(prompt.sum()), sides[1]
        tokens = _rounded(prompts + responses, batching.multiple_of)
        longest = int((prompt + rejected).max(initial=0))
        shape = PassShape(tokens, 1, responses, prompts, int(rejected.sum()), longest)
        yield RunPass(shape, prompt + sides[0], np.stack([prompt, rejected], axis=1))
        return
    packed = batching.name == "packed"
    if packed and two_pass:
        mixed = even_halves(*((prompt + side).tolist() for side in sides))
        sides = [np.choose(mixed, sides), np.choose(mixed, sides[::-1])]
    for group in [[side] for side in sides] if two_pass else [sides]:
        sequences = [prompt + side for side in group]
        scored = int(sum(group).sum())
        if packed:
            wholes = np.concatenate(sequences)
            yield RunPass(PassShape(_rounded(int(wholes.sum()), batching.multiple_of), 1, scored), wholes, _NO_BRANCHES)
        else:
            rows = len(group) * len(pairs)
            length = _rounded(int(np.max(sequences)), batching.multiple_of)
            yield RunPass(PassShape(rows * length, rows, scored), np.full(rows, length), _NO_BRANCHES)


def _rounded(tokens: int, multiple_of: int) -> int:
    return -(-tokens // multiple_of) * multiple_of
