"""The data report: numbers of kept, truncated and refused examples with reasons, and the check against the options."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64

from mindspeed_simpo.config.options import DataOptions
from mindspeed_simpo.data.examples import Examples
from mindspeed_simpo.data.problems import NO_FAULT, ProblemKind
from mindspeed_simpo.errors import DataError

logger = logging.getLogger(__name__)

PROBLEMS_LISTED = 10
"""Problems of each kind that a report lists."""
_KINDS: tuple[ProblemKind, ...] = ("malformed", "empty", "identical", "not_prefix", "too_long", "unreadable", *NO_FAULT)
_TITLES: dict[str, str] = {
    "not_prefix": "prompt not a prefix",
    "too_long": "too long",
    "unreadable": "unreadable image",
    "tie": "tied",
}


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
    unreadable: int
    """Examples of which an image is missing or damaged."""
    tie: int
    """Examples whose label or scores prefer no response."""
    unpaired: int
    """Prompts with a single answer."""
    contaminated: int
    """Held-out pairs that ``eval_decontaminate`` leaves out: their prompt is that of a training pair."""
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
    lengths: Int32[np.ndarray, "pair 3"]
    """Prompt, chosen and rejected response of each kept pair, tokens."""
    kept_rows: Int64[np.ndarray, " pair"]
    """The example of each kept pair, from 0."""

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


def make_report(examples: Examples) -> DataReport:
    """Count the examples, batch by batch: what it needs of memory is what it returns."""
    table = examples.table
    size = table.column("kind").null_count
    kept_rows, lengths = np.empty(size, np.int64), np.empty((size, 3), np.int32)
    counts: Counter[str] = Counter()
    listed: list[int] = []
    first = kept = prompts_cut = responses_cut = 0
    for batch in table.to_batches():
        for row in np.flatnonzero(batch.column("kind").is_valid()).tolist():
            kind = batch.column("kind")[row].as_py()
            counts[kind] += 1
            if counts[kind] <= PROBLEMS_LISTED:
                listed.append(first + row)
        usable = np.flatnonzero(batch.column("kind").is_null())
        part = slice(kept, kept + len(usable))
        kept_rows[part] = first + usable
        for side, name in enumerate(("prompt_ids", "chosen_ids", "rejected_ids")):
            lengths[part, side] = batch.column(name).value_lengths().to_numpy()[usable]
        cut = [batch.column(f"{name}_cut").to_numpy()[usable] for name in ("prompt", "chosen", "rejected")]
        prompts_cut += int(np.count_nonzero(cut[0]))
        responses_cut += int(np.count_nonzero(cut[1] + cut[2]))
        first, kept = first + batch.num_rows, part.stop
    return DataReport(
        files=examples.files,
        rows=table.num_rows,
        kept=size,
        **dict[str, Any]({kind: counts[kind] for kind in _KINDS}),
        contaminated=0,
        truncated_prompts=prompts_cut,
        truncated_responses=responses_cut,
        problems=tuple(_problem(examples, index) for index in listed),
        **_of_kept(kept_rows, lengths),
    )


def without(report: DataReport, dropped: Bool[np.ndarray, " pair"]) -> DataReport:
    """The report with some of the kept pairs counted as contaminated; its counts of cut pairs are those of all."""
    number = int(np.count_nonzero(dropped))
    changed: dict[str, Any] = {"kept": report.kept - number, "contaminated": report.contaminated + number}
    return dataclasses.replace(report, **changed, **_of_kept(report.kept_rows[~dropped], report.lengths[~dropped]))


def _of_kept(kept_rows: Int64[np.ndarray, " pair"], lengths: Int32[np.ndarray, "pair 3"]) -> dict[str, Any]:
    prompt, chosen, rejected = lengths.T
    return {
        "prompt_tokens": _statistics(prompt),
        "chosen_tokens": _statistics(chosen),
        "rejected_tokens": _statistics(rejected),
        "pair_tokens": _statistics(prompt + np.maximum(chosen, rejected)),
        "lengths": lengths,
        "kept_rows": kept_rows,
    }


def _statistics(lengths: Int32[np.ndarray, " pair"]) -> TokenStatistics:
    if not len(lengths):
        return TokenStatistics(0, 0.0, 0.0, 0.0, 0)
    numbers = np.bincount(lengths)
    total = int(numbers @ np.arange(len(numbers)))
    median, p95 = _percentile(numbers, 0.5), _percentile(numbers, 0.95)
    return TokenStatistics(total, total / len(lengths), median, p95, len(numbers) - 1)


def _percentile(numbers: Int64[np.ndarray, " length"], share: float) -> float:
    """The percentile between the two nearest of sorted lengths, as numpy's, from the number of each length."""
    up_to = np.cumsum(numbers)
    place = share * (int(up_to[-1]) - 1)
    low, high = (int(np.searchsorted(up_to, index, side="right")) for index in (math.floor(place), math.ceil(place)))
    return low + (high - low) * (place - math.floor(place))


def _problem(examples: Examples, index: int) -> ExampleProblem:
    kind, message = (examples.table.column(name)[index].as_py() for name in ("kind", "message"))
    return ExampleProblem(examples.where(index), kind, message)


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
