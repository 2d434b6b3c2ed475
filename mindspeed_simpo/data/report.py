"""The data report: numbers of kept, truncated and refused examples with reasons, and the check against the options."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]
from jaxtyping import Int64

from mindspeed_simpo.config.options import DataOptions
from mindspeed_simpo.data.problems import NO_FAULT, ProblemKind
from mindspeed_simpo.data.source import Source
from mindspeed_simpo.errors import DataError

logger = logging.getLogger(__name__)

PROBLEMS_LISTED = 10
"""Problems of each kind that a report lists."""
_KINDS: tuple[ProblemKind, ...] = ("malformed", "empty", "identical", "not_prefix", "too_long", *NO_FAULT)
_TITLES: dict[str, str] = {"not_prefix": "prompt not a prefix", "too_long": "too long", "tie": "tied"}


@dataclass(frozen=True)
class ExampleProblem:
    """An example that cannot be used."""

    source: str
    """``FILE:LINE`` or ``FILE:row N``."""
    kind: ProblemKind
    message: str

    def __str__(self) -> str:
        return f"{self.source}: {_TITLES.get(self.kind, self.kind)}: {self.message}"


@dataclass(frozen=True)
class TokenStatistics:
    """Distribution of a length in tokens over the kept pairs, after truncation."""

    total: int
    mean: float
    median: float
    p95: float
    longest: int


@dataclass(frozen=True)
class DataReport:
    """Counts of one part of the data: every example is kept, or counted under one kind of problem."""

    files: tuple[str, ...]
    rows: int
    """All examples."""
    kept: int
    malformed: int
    empty: int
    identical: int
    not_prefix: int
    too_long: int
    tie: int
    """Examples whose label or scores prefer no response."""
    unpaired: int
    """Prompts with a single answer."""
    truncated_prompts: int
    """Kept pairs whose prompt was cut."""
    truncated_responses: int
    """Kept pairs of which at least one response lost its tail and its end of turn."""
    problems: tuple[ExampleProblem, ...]
    """The first ``PROBLEMS_LISTED`` of each kind, in the order of the data."""
    prompt_tokens: TokenStatistics
    chosen_tokens: TokenStatistics
    rejected_tokens: TokenStatistics
    pair_tokens: TokenStatistics
    """Prompt and longer response."""
    lengths: Int64[np.ndarray, "pair 3"]
    """Prompt, chosen and rejected response of each kept pair, tokens."""

    def summary(self) -> str:
        """One line of counts."""
        counts = {kind: getattr(self, kind) for kind in _KINDS}
        left_out = ", ".join(f"{count} {_TITLES.get(kind, kind)}" for kind, count in counts.items() if count)
        cut = f"; {self.truncated_prompts} prompts and responses of {self.truncated_responses} pairs cut"
        return (
            f"{self.rows} rows, {self.kept} pairs kept"
            + (f"; left out: {left_out}" if left_out else "")
            + (cut if self.truncated_prompts or self.truncated_responses else "")
        )


def make_report(table: Any, sources: Sequence[Source]) -> DataReport:
    """Count the examples of a cache table."""
    kinds = table.column("kind")
    kept = np.flatnonzero(kinds.is_null().to_numpy())
    prompt, chosen, rejected = (_lengths(table, name)[kept] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    pair = prompt + np.maximum(chosen, rejected)
    prompt_cut, chosen_cut, rejected_cut = (
        table.column(name).to_numpy()[kept] for name in ("prompt_cut", "chosen_cut", "rejected_cut")
    )
    counts = {kind: np.flatnonzero(pc.equal(kinds, kind).fill_null(False).to_numpy()) for kind in _KINDS}
    listed = np.sort(np.concatenate([indices[:PROBLEMS_LISTED] for indices in counts.values()]))
    return DataReport(
        files=tuple(source.name for source in sources),
        rows=table.num_rows,
        kept=len(kept),
        **{kind: len(indices) for kind, indices in counts.items()},
        truncated_prompts=int(np.count_nonzero(prompt_cut)),
        truncated_responses=int(np.count_nonzero(chosen_cut + rejected_cut)),
        problems=tuple(_problem(table, int(index), sources) for index in listed),
        prompt_tokens=_statistics(prompt),
        chosen_tokens=_statistics(chosen),
        rejected_tokens=_statistics(rejected),
        pair_tokens=_statistics(pair),
        lengths=np.stack([prompt, chosen, rejected], axis=1),
    )


def _lengths(table: Any, name: str) -> Int64[np.ndarray, " example"]:
    chunks = [np.diff(chunk.offsets.to_numpy()) for chunk in table.column(name).chunks]
    return np.concatenate([np.zeros(0, np.int64), *chunks]).astype(np.int64)


def _statistics(lengths: Int64[np.ndarray, " pair"]) -> TokenStatistics:
    if not len(lengths):
        return TokenStatistics(0, 0.0, 0.0, 0.0, 0)
    median, p95 = np.percentile(lengths, [50, 95])
    return TokenStatistics(int(lengths.sum()), float(lengths.mean()), float(median), float(p95), int(lengths.max()))


def _problem(table: Any, index: int, sources: Sequence[Source]) -> ExampleProblem:
    source, number, kind, message = (
        table.column(name)[index].as_py() for name in ("source", "line", "kind", "message")
    )
    return ExampleProblem(sources[source].where(number), kind, message)


def judge(report: DataReport, options: DataOptions) -> None:
    """Refuse the data where examples cannot be used and the options do not allow that, else log what is left out.

    Raises:
        DataError: where ``data_errors`` is ``fail`` and examples cannot be used, where ``truncation`` is ``error``
            and pairs are too long, and where no pair is left. The message lists the first of them and names the
            option that leaves them out.
    """
    # With keep_start and keep_end, a pair counts as too long only where truncation cannot make it fit.
    long_is_length = options.truncation in ("error", "drop")
    no_fault = report.tie + report.unpaired
    bad = report.rows - report.kept - no_fault - (report.too_long if long_is_length else 0)
    complaints = []
    if bad and options.data_errors == "fail":
        excused = (*NO_FAULT, "too_long") if long_is_length else NO_FAULT
        listed = [problem for problem in report.problems if problem.kind not in excused]
        complaints.append(
            f"{bad} of {report.rows} rows cannot be used:\n{_listing(listed, bad)}\n"
            "Correct them, or set `data_errors: drop` to leave them out."
        )
    if report.too_long and options.truncation == "error":
        listed = [problem for problem in report.problems if problem.kind == "too_long"]
        complaints.append(
            f"{report.too_long} of {report.rows} pairs are longer than seq_length {options.seq_length}:\n"
            f"{_listing(listed, report.too_long)}\n"
            "Raise seq_length, or set `truncation` to drop, keep_end or keep_start."
        )
    if complaints:
        raise DataError("\n".join(complaints))
    if not report.kept:
        raise DataError(
            f"no pair is left of {report.rows} rows in {', '.join(report.files)} ({report.summary()}):\n"
            f"{_listing(report.problems, report.rows)}"
        )
    if report.kept < report.rows:
        logger.warning("%s\n%s", report.summary(), _listing(report.problems, report.rows - report.kept))
    else:
        logger.info("%s", report.summary())


def _listing(problems: Sequence[ExampleProblem], total: int) -> str:
    shown = problems[:PROBLEMS_LISTED]
    rest = total - len(shown)
    return "\n".join(f"  {problem}" for problem in shown) + (f"\n  and {rest} more" if rest else "")
