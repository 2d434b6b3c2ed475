"""How large the passes of a run through its model get, from the lengths of its pairs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from mindspeed_simpo.batch import even_halves
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.loader import PairStream

SIMULATED_PAIRS = 200_000
"""Pairs of the run, from its start, whose micro-batches are looked at."""


class PassShape(NamedTuple):
    """What one forward of a rank's model takes: a micro-batch, or with ``two_pass`` a half of one."""

    tokens: int
    """Of all rows, padding included."""
    rows: int
    scored: int
    """Response tokens."""
    prefixes: int = 0
    """Tokens of prompts that a branch reads again; ``batching: prefix_shared`` only, like what follows."""
    branch_tokens: int = 0
    """Tokens of the branches."""
    longest_branch: int = 0
    """Tokens of one branch and its prefix."""


@dataclass(frozen=True)
class LargestPass:
    """The most that one pass of a data-parallel rank takes, each number by itself, and several together."""

    shape: PassShape
    in_flight: tuple[int, ...]
    """Tokens of one, two and so on passes that follow each other, up to the number of pipeline stages."""
    passes: int
    """Of one step."""


def largest_pass(lengths: Int64[np.ndarray, "pair 3"], config: Config, layout: Layout) -> LargestPass:
    """Deal the pairs of a run as :class:`~mindspeed_simpo.data.loader.PairLoader` does, and keep the largest numbers.

    Later epochs deal the same pairs in another order; the first one stands for them.

    Args:
        lengths: Tokens of prompt, chosen and rejected response of every pair; at least one pair.
        config: Batch options, ``seed`` and ``train_iters``.
        layout: Of the run.
    """
    size = config.global_batch_size
    epoch = -(-len(lengths) // size)
    steps = min(config.train_iters or epoch, epoch, -(-SIMULATED_PAIRS // size))
    stream = PairStream(len(lengths), config.seed)
    batching = Batching.of(config)
    found: list[list[PassShape]] = []
    for step in range(steps):
        pairs = lengths[stream.take(step * size, size)]
        sizes = [batching.size_of(*row) for row in pairs.tolist()]
        for own in batching.deal(sizes, layout.data):
            parts = batching.parts([sizes[index] for index in own])
            found.append([shape for part in parts for shape in _passes(pairs[own][part], config)])
    shapes = [shape for step_shapes in found for shape in step_shapes]
    return LargestPass(
        shape=PassShape(*map(max, zip(*shapes, strict=True))),
        in_flight=tuple(max(map(_window(number), found)) for number in range(1, layout.pipeline + 1)),
        passes=max(map(len, found)),
    )


def _window(number: int) -> Callable[[Sequence[PassShape]], int]:
    def largest(passes: Sequence[PassShape]) -> int:
        tokens = [each.tokens for each in passes]
        return max(sum(tokens[start : start + number]) for start in range(max(1, len(tokens) - number + 1)))

    return largest


def _passes(pairs: Int64[np.ndarray, "part 3"], config: Config) -> Iterator[PassShape]:
    """The passes of the pairs of one micro-batch."""
    prompt, *sides = pairs.T
    if config.batching_in_use == "prefix_shared":
        responses, prompts, rejected = int(sum(sides).sum()), int(prompt.sum()), sides[1]
        tokens = _rounded(prompts + responses, config)
        yield PassShape(tokens, 1, responses, prompts, int(rejected.sum()), int((prompt + rejected).max()))
        return
    packed = config.batching_in_use == "packed"
    if packed and config.pair_schedule == "two_pass":
        mixed = even_halves(*((prompt + side).tolist() for side in sides))
        sides = [np.choose(mixed, sides), np.choose(mixed, sides[::-1])]
    for group in [[side] for side in sides] if config.pair_schedule == "two_pass" else [sides]:
        sequences = [prompt + side for side in group]
        scored = int(sum(group).sum())
        if packed:
            yield PassShape(_rounded(int(sum(sequences).sum()), config), 1, scored)
        else:
            rows = len(group) * len(pairs)
            yield PassShape(rows * _rounded(int(np.max(sequences)), config), rows, scored)


def _rounded(tokens: int, config: Config) -> int:
    return -(-tokens // config.sequence_multiple) * config.sequence_multiple
