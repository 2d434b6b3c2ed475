"""The passes of a run's steps as arrays: tokens, response tokens and (query, key) pairs of each pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.largest import (
    DealtStep,
    LargestPass,
    PassShape,
    RunPass,
    largest_of,
    largest_pass,
    steps_of_run,
)

FULLEST = 4
"""Data-parallel ranks of a step, those with the most tokens, whose passes are simulated: the others wait for them."""
_STEPS, _PAIRS = 8, 1024
"""Largest number of simulated steps, and of their pairs, but at least one step."""


@dataclass(frozen=True)
class Passes:
    """The passes of one data-parallel rank in one step; each array has an element of each pass."""

    tokens: Float[np.ndarray, " pass"]
    """Of all rows, padding included, over all context-parallel ranks."""
    rows: Float[np.ndarray, " pass"]
    scored: Float[np.ndarray, " pass"]
    """Response tokens."""
    documents: Float[np.ndarray, " pass"]
    """Calls of the attention kernel where it has no variable lengths."""
    prefixes: Float[np.ndarray, " pass"]
    """Tokens whose keys and values a second attention call reads again."""
    attended: dict[int | None, Float[np.ndarray, " pass"]]
    """(query, key) pairs that attention lets through, by the window of a layer."""

    @property
    def number(self) -> int:
        """Passes of the step."""
        return len(self.tokens)

    @classmethod
    def of(cls, passes: Sequence[RunPass], windows: Sequence[int | None], *, equal: bool) -> Passes:
        """From the passes of a run.

        Args:
            passes: Of one rank in one step.
            windows: The windows of the model's layers.
            equal: Whether all passes are padded to the longest.
        """
        tokens = np.array([each.shape.tokens for each in passes], dtype=float)
        attended = {window: np.array([float(_attended(each, window)) for each in passes]) for window in windows}
        rows = np.array([each.shape.rows for each in passes], dtype=float)
        if equal:
            longest = np.max(tokens / rows)
            padding = longest - tokens / rows  # a document of its own
            for window, pairs in attended.items():
                attended[window] = pairs + rows * _causal(padding, 0, window)
            tokens = longest * rows
        return cls(
            tokens,
            rows,
            np.array([each.shape.scored for each in passes], dtype=float),
            np.array([len(each.wholes) + len(each.branches) for each in passes], dtype=float),
            np.array([each.shape.prefixes for each in passes], dtype=float),
            attended,
        )

    @classmethod
    def joined(cls, several: Sequence[Passes]) -> Passes:
        """The passes of several ranks or steps, one after the other."""
        return cls(
            **{
                each.name: np.concatenate([getattr(one, each.name) for one in several])
                for each in dataclasses.fields(cls)
                if each.name != "attended"
            },
            attended={
                window: np.concatenate([one.attended[window] for one in several]) for window in several[0].attended
            },
        )

    def mean(self) -> Passes:
        """One pass of mean size."""
        return Passes(
            **{
                each.name: np.mean(getattr(self, each.name), keepdims=True)
                for each in dataclasses.fields(self)
                if each.name != "attended"
            },
            attended={window: np.mean(pairs, keepdims=True) for window, pairs in self.attended.items()},
        )

    def filled_to(self, number: int, tokens: int) -> Passes:
        """With passes of a filler pair, of ``tokens`` tokens each, up to ``number`` passes."""
        missing = number - self.number
        if missing <= 0:
            return self
        values = {"tokens": tokens, "rows": 1, "documents": 1}
        return Passes(
            **{
                each.name: np.append(getattr(self, each.name), np.full(missing, values.get(each.name, 0.0)))
                for each in dataclasses.fields(self)
                if each.name != "attended"
            },
            attended={window: np.append(pairs, np.zeros(missing)) for window, pairs in self.attended.items()},
        )


def _attended(each: RunPass, window: int | None) -> float:
    """(query, key) pairs of all documents of a pass."""
    prefix, branch = each.branches.T
    return float(_causal(each.wholes, 0, window).sum() + _causal(branch, prefix, window).sum())


def _causal(queries: np.ndarray, prefix: np.ndarray | int, window: int | None) -> np.ndarray:
    """``sum over i <= queries of min(prefix + i, window)`` of each document."""
    queries = np.asarray(queries, dtype=float)
    if window is None:
        return np.asarray(prefix * queries + queries * (queries + 1) / 2)
    whole = np.clip(window - np.asarray(prefix), 0, queries)
    return np.asarray(prefix * whole + whole * (whole + 1) / 2 + (queries - whole) * window)


@dataclass(frozen=True)
class StepPasses:
    """The fullest data-parallel ranks of one step."""

    ranks: tuple[Passes, ...]
    """Fullest first."""
    balance: float
    """Mean over all ranks of their tokens, over those of the fullest rank."""
    pairs: int
    """Of the global batch, without fillers."""
    shapes: tuple[tuple[PassShape, ...], ...]
    """Of the passes of ``ranks``."""


@dataclass
class RunLengths:
    """The lengths of a run's pairs, and what has been computed of them."""

    lengths: Int[np.ndarray, "pair 3"]
    windows: tuple[int | None, ...]
    source: str
    """Where the lengths are from, for the report."""
    _dealt: dict[tuple[object, ...], list[tuple[DealtStep, np.ndarray]]] = field(default_factory=dict)
    _steps: dict[tuple[object, ...], list[StepPasses]] = field(default_factory=dict)
    _means: dict[int, tuple[Passes, float]] = field(default_factory=dict)
    _largest: dict[tuple[object, ...], LargestPass] = field(default_factory=dict)

    def steps(self, config: Config, layout: Layout, *, ranks: int = 1) -> list[StepPasses]:
        """The simulated steps of a layout, with the passes of the ``ranks`` fullest data-parallel ranks."""
        batching, two_pass = Batching.of(config), config.pair_schedule == "two_pass"
        key = (batching, layout.data, two_pass, layout.virtual_pipeline, ranks)
        if key not in self._steps:
            most = max(config.global_batch_size, min(_PAIRS, _STEPS * config.global_batch_size))
            dealt_key = (batching.name, batching.micro_batch_size, layout.data, two_pass)
            if dealt_key not in self._dealt:
                dealt = steps_of_run(self.lengths, config, batching, layout.data, most)
                self._dealt[dealt_key] = [(step, _loads(step)) for step in dealt]
            self._steps[key] = [
                self._step(dataclasses.replace(step, batching=batching), loads, ranks, equal=layout.virtual_pipeline)
                for step, loads in self._dealt[dealt_key]
            ]
        return self._steps[key]

    def mean_pass(self, config: Config, layout: Layout) -> tuple[Passes, float]:
        """One pass of the mean size of those of the fullest data-parallel ranks, and how many a step has."""
        steps = self.steps(config, layout)
        key = id(steps)
        if key not in self._means:
            joined = Passes.joined([step.ranks[0] for step in steps])
            self._means[key] = joined.mean(), joined.number / len(steps)
        return self._means[key]

    def _step(self, step: DealtStep, loads: np.ndarray, ranks: int, *, equal: bool) -> StepPasses:
        fullest = np.argsort(-loads, kind="stable")[:ranks]
        run = [step.passes_of(rank) for rank in fullest.tolist()]
        shapes = tuple(tuple(each.shape for each in passes) for passes in run)
        found = [Passes.of(passes, self.windows, equal=equal) for passes in run]
        if step.batching.equal_micro_batches:
            number = max(each.number for each in found)
            found = [each.filled_to(number, step.batching.multiple_of) for each in found]
        pairs = int((step.pairs.sum(axis=1) > 0).sum())
        return StepPasses(tuple(found), float(loads.mean() / max(loads.max(), 1)), pairs, shapes)

    def largest(self, config: Config, layout: Layout, *, whole_run: bool) -> LargestPass:
        """The largest pass of the simulated steps, or of the whole run as ``check`` computes it."""
        key = (Batching.of(config), layout.data, layout.pipeline, config.pair_schedule == "two_pass", whole_run)
        if key not in self._largest:
            if whole_run:
                self._largest[key] = largest_pass(self.lengths, config, Batching.of(config), layout)
            else:
                steps = self.steps(config, layout)
                self._largest[key] = largest_of([shapes for step in steps for shapes in step.shapes], layout.pipeline)
        return self._largest[key]


def _loads(step: DealtStep) -> np.ndarray:
    """Tokens of each data-parallel rank, rounding aside."""
    if step.batching.name != "padded":
        return np.array([sum(step.sizes[index] for index in own) for own in step.dealt], dtype=float)
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
