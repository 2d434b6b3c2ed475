"""The passes of a run's steps as arrays: tokens, response tokens and (query, key) pairs of each pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mindspeed_simpo.data.largest import RunPass


@dataclass(frozen=True)
class Passes:
    """The passes of one data-parallel rank in one step; each array has an element of each pass."""

    tokens: Float[np.ndarray, " pass"]
    """Of all rows, padding included, over all context-parallel ranks."""
    rows: Float[np.ndarray, " pass"]
    scored: Float[np.ndarray, " pass"]
    """Response tokens."""
    sequences: Float[np.ndarray, " pass"]
    """Sums of log-probabilities that context-parallel ranks add up."""
    calls: Float[np.ndarray, " pass"]
    """Calls of the attention kernel."""
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
    def of(cls, passes: Sequence[RunPass], windows: Sequence[int | None], *, padded: bool) -> Passes:
        """From the passes of a run.

        Args:
            passes: Of one rank in one step.
            windows: The windows of the model's layers.
            padded: Whether each sequence has a row of its own.
        """
        shapes = np.array([each.shape[:4] for each in passes], dtype=float).reshape(len(passes), 4)
        tokens, rows, scored, prefixes = shapes.T
        documents = np.array([len(each.wholes) + len(each.branches) for each in passes], dtype=float)
        attended = {window: np.array([_attended(each, window) for each in passes]) for window in windows}
        sequences, documents = (rows, np.ones(len(passes))) if padded else (2 * documents, documents)
        return cls(tokens, rows, scored, sequences, 1.0 + (prefixes > 0), documents, prefixes, attended)

    def rounded(self, multiple_of: int, *, padded: bool, equal: bool) -> Passes:
        """With rows of a multiple of so many tokens.

        Args:
            multiple_of: Tokens.
            padded: Whether each sequence has a row of its own, so that padding is attended to.
            equal: Whether all passes are padded to the longest row.
        """
        length = np.ceil(self.tokens / self.rows / multiple_of) * multiple_of
        if padded:
            length = np.full_like(length, length.max()) if equal else length
            attended = {window: self.rows * _causal(length, 0, window) for window in self.attended}
            return dataclasses.replace(self, tokens=length * self.rows, attended=attended)
        if not equal:
            return dataclasses.replace(self, tokens=length * self.rows)
        padding = length.max() - length  # a document of its own
        attended = {window: pairs + _causal(padding, 0, window) for window, pairs in self.attended.items()}
        return dataclasses.replace(self, tokens=length + padding, attended=attended)

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

    def at(self, index: int | slice) -> Passes:
        """Some of the passes."""
        chosen = slice(index, index + 1 or None) if isinstance(index, int) else index
        return self._each(lambda values: values[chosen])

    def mean(self) -> Passes:
        """One pass of mean size."""
        return self._each(lambda values: np.mean(values, keepdims=True))

    def times(self, factor: Float[np.ndarray, " pass"]) -> Passes:
        """All sizes multiplied."""
        return self._each(lambda values: factor * values)

    def _each(self, change: Callable[[np.ndarray], np.ndarray]) -> Passes:
        names = [each.name for each in dataclasses.fields(self) if each.name != "attended"]
        values = {name: change(getattr(self, name)) for name in names}
        return Passes(**values, attended={window: change(pairs) for window, pairs in self.attended.items()})

    def filled_to(self, number: int, tokens: int) -> Passes:
        """With passes of a filler pair, of ``tokens`` tokens each, up to ``number`` passes."""
        missing = number - self.number
        if missing <= 0:
            return self
        none, one = np.zeros(1), np.ones(1)
        attended = dict.fromkeys(self.attended, none)
        filler = Passes(np.full(1, float(tokens)), one, none, one, one, one, none, attended)
        return Passes.joined([self, *[filler] * missing])


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
