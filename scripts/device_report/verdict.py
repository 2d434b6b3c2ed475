"""Whether numerics held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

HELD, NOT_HELD, INCOMPLETE = "held", "did not hold", "incomplete"


@dataclass
class Result:
    """What a section found, and how it ended."""

    title: str
    reading: str
    numerics: bool
    optional: bool
    status: str
    """``done``, ``failed``, ``timed out`` or ``left out``."""
    seconds: float = 0.0
    error: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compared(result: Result) -> list[dict[str, Any]]:
    """The rows that compare something with its reference, or could not."""
    return [row for row in result.rows if "case" in row]


def failures(results: Mapping[str, Result]) -> Iterator[str]:
    """Each comparison that is out of its bound, or did not end."""
    for name, result in results.items():
        if not result.numerics:
            continue
        for row in compared(result):
            # two ranks on one device may not work; where they do, their numbers count
            if row.get("holds") is False and ("error" in row or not result.optional):
                what = f"{row['case']}, {row['dtype']}"
                if "error" in row:
                    yield f"{name}: {what}: {row['of']} is off by {row['error']:.2e}, bound {row['bound']:.1e}"
                else:
                    said = row.get("crashed") or row.get("refused") or ""
                    yield f"{name}: {what}: {said.strip().splitlines()[-1] if said.strip() else 'failed'}"


def missing(results: Mapping[str, Result]) -> Iterator[str]:
    """What the verdict should rest on and was not seen."""
    for name, result in results.items():
        if not result.numerics or result.optional:
            continue
        if result.status != "done":
            yield f"{name}: {result.status}"
        for row in result.rows:
            if "left_out" in row:
                yield f"{name}: {row['left_out']} left out"


def verdict(results: Mapping[str, Result]) -> dict[str, Any]:
    """``held`` where every comparison of every numeric section ran and is within its bound."""
    wrong, unseen = list(failures(results)), list(missing(results))
    judged = [row for each in results.values() if each.numerics for row in compared(each) if row.get("holds")]
    numerics = NOT_HELD if wrong else INCOMPLETE if unseen or not judged else HELD
    return {"numerics": numerics, "comparisons": len(judged) + len(wrong), "failures": wrong, "missing": unseen}
