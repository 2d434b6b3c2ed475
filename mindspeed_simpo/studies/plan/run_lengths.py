"""The lengths of a run's pairs, and the passes that they make, computed once for all layouts that share them."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.largest import DealtStep, LargestPass, PassShape, largest_of, largest_pass, steps_of_run
from mindspeed_simpo.studies.plan.passes import Passes

FULLEST = 4
"""Data-parallel ranks of a step, those with the most tokens, whose passes are simulated: the others wait for them."""
KINDS = 4
"""Passes of a :class:`MeanPasses`."""
_STEPS, _PAIRS = 8, 1024
"""Largest number of simulated steps, and of their pairs, but at least one step."""


@dataclass(frozen=True)
class StepPasses:
    """The fullest data-parallel ranks of one step."""

    ranks: tuple[Passes, ...]
    """Fullest first."""
    balance: float
    """Mean over all ranks of their tokens, over those of the fullest rank."""
    pairs: int
    """Of the global batch, without fillers."""


@dataclass(frozen=True)
class MeanPasses:
    """Passes of the fullest data-parallel ranks of the simulated steps, by which the seconds of a step are bounded."""

    passes: Passes
    """``KINDS`` of them: of mean size, the first and the last of a step, and the mean of those of :attr:`again`."""
    number: float
    """Passes of a step."""
    again: float
    """Passes that ``two_pass`` scores twice."""
    pairs: float
    """Pairs of a step."""


@dataclass(frozen=True)
class _Parts:
    """Passes of one step, their rows not rounded."""

    ranks: tuple[Passes, ...]
    shapes: tuple[tuple[PassShape, ...], ...]
    balance: float
    pairs: int


_Key = tuple[object, ...]


@dataclass
class RunLengths:
    """The lengths of a run's pairs, and what has been computed of them."""

    lengths: Int[np.ndarray, "pair 3"]
    windows: tuple[int | None, ...]
    source: str
    """Where the lengths are from, for the report."""
    _dealt: dict[_Key, list[tuple[DealtStep, np.ndarray]]] = field(default_factory=dict)
    _parts: dict[_Key, list[_Parts]] = field(default_factory=dict)
    _steps: dict[_Key, list[StepPasses]] = field(default_factory=dict)
    _means: dict[_Key, MeanPasses] = field(default_factory=dict)
    _largest: dict[_Key, LargestPass] = field(default_factory=dict)

    def steps(self, config: Config, layout: Layout, *, ranks: int = 1) -> list[StepPasses]:
        """The simulated steps of a layout, with the passes of the ``ranks`` fullest data-parallel ranks."""
        batching, key = _keys(config, layout)
        multiple_of, equal = batching.multiple_of, layout.virtual_pipeline
        key = (*key, multiple_of, equal, batching.equal_micro_batches, ranks)
        if key not in self._steps:
            self._steps[key] = [
                StepPasses(_rounded(parts, batching, equal=equal), parts.balance, parts.pairs)
                for parts in self._unrounded(config, layout, ranks)
            ]
        return self._steps[key]

    def means(self, config: Config, layout: Layout) -> MeanPasses:
        """What bounds the seconds of the fullest data-parallel rank's passes from below."""
        batching, key = _keys(config, layout)
        key = (*key, batching.multiple_of, layout.virtual_pipeline)
        if key not in self._means:
            steps = self.steps(config, layout)
            of_steps = [step.ranks[0] for step in steps]
            joined = Passes.joined(of_steps)
            ends = [Passes.joined([each.at(place) for each in of_steps]).mean() for place in (0, -1)]
            again = Passes.joined([each.at(slice(1, None, 2)) for each in of_steps])
            self._means[key] = MeanPasses(
                Passes.joined([joined.mean(), *ends, (again if again.number else joined).mean()]),
                joined.number / len(steps),
                again.number / len(steps),
                float(np.mean([step.pairs for step in steps])),
            )
        return self._means[key]

    def largest(self, config: Config, layout: Layout, *, whole_run: bool) -> LargestPass:
        """The largest pass of the simulated steps, or of the whole run as ``check`` computes it."""
        batching, key = _keys(config, layout)
        key = (*key, batching.multiple_of, batching.equal_micro_batches, layout.pipeline, whole_run)
        if key not in self._largest:
            if whole_run:
                self._largest[key] = largest_pass(self.lengths, config, batching, layout)
            else:
                of_ranks = [each for parts in self._unrounded(config, layout, 1) for each in parts.shapes]
                rounded = [[_shape(each, batching) for each in shapes] for shapes in of_ranks]
                self._largest[key] = largest_of(rounded, layout.pipeline)
        return self._largest[key]

    def _unrounded(self, config: Config, layout: Layout, ranks: int) -> list[_Parts]:
        batching, key = _keys(config, layout)
        key = (*key, ranks)
        if key not in self._parts:
            capacity = batching.max_tokens // batching.multiple_of * batching.multiple_of
            unrounded = dataclasses.replace(batching, multiple_of=1, max_tokens=capacity)
            self._parts[key] = [
                self._of_step(dataclasses.replace(step, batching=unrounded), loads, ranks)
                for step, loads in self._steps_dealt(config, layout)
            ]
        return self._parts[key]

    def _of_step(self, step: DealtStep, loads: np.ndarray, ranks: int) -> _Parts:
        fullest = np.argsort(-loads, kind="stable")[:ranks]
        run = [step.passes_of(rank) for rank in fullest.tolist()]
        padded = step.batching.name == "padded"
        return _Parts(
            tuple(Passes.of(passes, self.windows, padded=padded) for passes in run),
            tuple(tuple(each.shape for each in passes) for passes in run),
            float(loads.mean() / max(loads.max(), 1)),
            int((step.pairs.sum(axis=1) > 0).sum()),
        )

    def _steps_dealt(self, config: Config, layout: Layout) -> list[tuple[DealtStep, np.ndarray]]:
        """The simulated steps, and the tokens of each data-parallel rank."""
        batching, two_pass = Batching.of(config), config.pair_schedule == "two_pass"
        key = (batching.name, batching.micro_batch_size, layout.data)
        if key not in self._dealt:
            most = max(config.global_batch_size, min(_PAIRS, _STEPS * config.global_batch_size))
            dealt = steps_of_run(self.lengths, config, batching, layout.data, most)
            self._dealt[key] = [(step, _loads(step)) for step in dealt]
        return [(dataclasses.replace(step, two_pass=two_pass), loads) for step, loads in self._dealt[key]]


def _keys(config: Config, layout: Layout) -> tuple[Batching, _Key]:
    """The batching, and what decides which pairs are in which micro-batch."""
    batching = Batching.of(config)
    capacity = batching.max_tokens // batching.multiple_of * batching.multiple_of
    size = batching.micro_batch_size if batching.name == "padded" else capacity
    multiple = 1 if batching.name == "padded" else batching.number_multiple_of
    return batching, (batching.name, size, multiple, layout.data, config.pair_schedule == "two_pass")


def _rounded(parts: _Parts, batching: Batching, *, equal: bool) -> tuple[Passes, ...]:
    padded = batching.name == "padded"
    found = [each.rounded(batching.multiple_of, padded=padded, equal=equal) for each in parts.ranks]
    if batching.equal_micro_batches:
        number = max(each.number for each in found)
        found = [each.filled_to(number, batching.multiple_of) for each in found]
    return tuple(found)


def _shape(shape: PassShape, batching: Batching) -> PassShape:
    row = -(-shape.tokens // shape.rows // batching.multiple_of) * batching.multiple_of
    return shape._replace(tokens=row * shape.rows)


def _loads(step: DealtStep) -> np.ndarray:
    """Tokens of each data-parallel rank, rounding aside."""
    if step.batching.name != "padded":
        sizes, number = np.asarray(step.sizes), [len(own) for own in step.dealt]
        order = np.fromiter(itertools.chain.from_iterable(step.dealt), dtype=np.int64, count=sum(number))
        return np.add.reduceat(sizes[order], np.cumsum([0, *number[:-1]])).astype(float)
    longest = step.pairs[:, 0] + step.pairs[:, 1:].max(axis=1)
    of_batches = longest.reshape(-1, step.batching.micro_batch_size).max(axis=1)
    return np.asarray(of_batches.reshape(-1, len(step.dealt)).sum(axis=0), dtype=float)


def assumed_lengths(prompt: int, chosen: int, rejected: int, seq_length: int, pairs: int) -> Int[np.ndarray, "pair 3"]:
    """Lengths of pairs with these means: log-normal, standard deviation of the logarithm 0.5, cut to ``seq_length``.

    Args:
        prompt: Mean tokens of a prompt; the next two those of the responses.
        chosen: See ``prompt``.
        rejected: See ``prompt``.
        seq_length: Largest number of tokens of a prompt and one response.
        pairs: Number of pairs.
    """
    generator, deviation = np.random.default_rng(0), 0.5
    means = np.array([prompt, chosen, rejected])
    drawn = np.exp(generator.normal(np.log(means) - deviation**2 / 2, deviation, size=(pairs, 3)))
    lengths = np.maximum(1, np.rint(drawn)).astype(np.int64)
    lengths[:, 1:] = np.clip(lengths[:, 1:], 1, seq_length // 2)
    lengths[:, 0] = np.minimum(lengths[:, 0], seq_length - lengths[:, 1:].max(axis=1))
    return lengths
