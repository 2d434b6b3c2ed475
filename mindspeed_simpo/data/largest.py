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
    size = options.global_batch_size
    stream = PairStream(mixture or Mixture.of_all(len(lengths)), options.seed)
    epoch = stream.steps_per_epoch(size)
    steps = min(options.train_iters or epoch, epoch, -(-SIMULATED_PAIRS // size))
    two_pass = options.pair_schedule == "two_pass"
    found: list[list[PassShape]] = []
    for step in range(steps):
        taken = lengths[stream.take(stream.consumed_pairs(step, size), size)]
        pairs = np.concatenate([taken, np.zeros((size - len(taken), 3), taken.dtype)])  # filler pairs
        sizes = [batching.size_of(*row) for row in pairs.tolist()]
        for own in batching.deal(sizes, layout.data):
            parts = batching.parts([sizes[index] for index in own])
            found.append([shape for part in parts for shape in _passes(pairs[own][part], batching, two_pass=two_pass)])
    shapes = [shape for step_shapes in found for shape in step_shapes]
    return LargestPass(
        shape=PassShape(*map(max, zip(*shapes, strict=True))),
        in_flight=tuple(max(map(_window(number), found)) for number in range(1, layout.pipeline + 1)),
        passes=max(map(len, found)),
    )


def _window(number: int) -> Callable[[Sequence[PassShape]], int]:
    """The largest sum of tokens of ``number`` consecutive passes, as a function of the passes of one step."""

    def largest(passes: Sequence[PassShape]) -> int:
        tokens = [each.tokens for each in passes]
        return max(sum(tokens[start : start + number]) for start in range(max(1, len(tokens) - number + 1)))

    return largest


def _passes(pairs: Int[np.ndarray, "part 3"], batching: Batching, *, two_pass: bool) -> Iterator[PassShape]:
    """The passes of the pairs of one micro-batch."""
    prompt, *sides = pairs.T
    if batching.name == "prefix_shared":
        responses, prompts, rejected = int(sum(sides).sum()), int(prompt.sum()), sides[1]
        tokens = _rounded(prompts + responses, batching.multiple_of)
        yield PassShape(tokens, 1, responses, prompts, int(rejected.sum()), int((prompt + rejected).max(initial=0)))
        return
    packed = batching.name == "packed"
    if packed and two_pass:
        mixed = even_halves(*((prompt + side).tolist() for side in sides))
        sides = [np.choose(mixed, sides), np.choose(mixed, sides[::-1])]
    for group in [[side] for side in sides] if two_pass else [sides]:
        sequences = [prompt + side for side in group]
        scored = int(sum(group).sum())
        if packed:
            yield PassShape(_rounded(int(sum(sequences).sum()), batching.multiple_of), 1, scored)
        else:
            rows = len(group) * len(pairs)
            yield PassShape(rows * _rounded(int(np.max(sequences)), batching.multiple_of), rows, scored)


def _rounded(tokens: int, multiple_of: int) -> int:
    return -(-tokens // multiple_of) * multiple_of
