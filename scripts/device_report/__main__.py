"""``bash scripts/device_report.sh``: runs the sections and writes the report, again after each of them."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mindspeed_simpo.device import find_device
from mindspeed_simpo.studies.whole_file import write_whole
from scripts.device_report.job import Job
from scripts.device_report.page import page
from scripts.device_report.processes import Outcome, Processes
from scripts.device_report.rates import device_kind
from scripts.device_report.sections import BEFORE_RANKS, CONDITIONS, Section, of_ranks
from scripts.device_report.verdict import HELD, Result, verdict

_LEAST_S = 1.0
"""Seconds with less than which no section is started."""
_MARGIN_S = 3.0
"""Between a section's own deadline and the moment at which it is killed; the fifth of its limit where that is more."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bash scripts/device_report.sh", description=__doc__)
    parser.add_argument("--device", choices=["auto", "npu", "cuda", "cpu"], default="auto")
    parser.add_argument("--output", type=Path, default=Path("outputs/device_report"), help="folder of the report")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything; what has none is left out")
    parser.add_argument("--small", action="store_true", help="small shapes; the default on a CPU")
    parser.add_argument("--relative-to", type=Path, default=Path(), help="where a relative --output lies")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="only these sections, by name")
    return parser.parse_args(argv)


class Report:
    """Results so far, and the files that say them."""

    def __init__(self, output: Path, device: str, minutes: float, *, small: bool) -> None:
        self.output, self.device, self.minutes, self.small = output, device, minutes, small
        self.begin = time.time()
        self.results: dict[str, Result] = {}

    @property
    def seconds_left(self) -> float:
        """Of the time for everything."""
        return self.begin + 60 * self.minutes - time.time()

    @property
    def facts(self) -> dict[str, Any]:
        """Row of the conditions."""
        rows = self.rows("conditions")
        return rows[0] if rows else {}

    def rows(self, section: str) -> list[dict[str, Any]]:
        """What a section has found."""
        return self.results[section].rows if section in self.results else []

    def as_dict(self) -> dict[str, Any]:
        """What ``report.json`` has."""
        return {
            "verdict": verdict(self.results),
            "device": self.device,
            "small": self.small,
            "minutes": self.minutes,
            "seconds": time.time() - self.begin,
            "sections": {name: result.as_dict() for name, result in self.results.items()},
        }

    def write(self) -> None:
        """``report.json``, ``report.html`` and, once there are rates, ``device_kind.json``."""
        found = self.as_dict()
        write_whole(self.output / "report.json", json.dumps(_finite(found), indent=1) + "\n")
        write_whole(self.output / "report.html", page(found))
        if self.facts and self.rows("rates"):
            links = [row["link"] for name in self.results for row in self.rows(name) if "link" in row]
            kind = device_kind(self.facts, self.rows("rates")[0], links[-1] if links else None)
            write_whole(self.output / "device_kind.json", kind.model_dump_json(indent=1) + "\n")


def run_section(report: Report, processes: Processes, section: Section, folder: Path) -> None:
    """Run a section in what is left of the time, and keep what it found."""
    limit = min(section.seconds, report.seconds_left)
    result = Result(section.title, section.reading, section.numerics, section.optional, "left out")
    report.results[section.name] = result
    if limit < _LEAST_S:
        result.error = "no time was left"
        return
    rows = folder / f"{section.name}.jsonl"
    rows.touch()
    deadline = time.time() + limit - max(_MARGIN_S, limit / 5)
    options = {**section.options, "facts": report.facts, "rates": next(iter(report.rows("rates")), {})}
    jobs = [
        Job(report.device, report.small, rows, folder, deadline, rank, section.ranks, options)  # type: ignore[arg-type]
        for rank in range(section.ranks)
    ]
    outcome: Outcome = processes.run(section.module_name, jobs, limit)
    result.status, result.seconds, result.error = outcome.status, outcome.seconds, outcome.error
    result.rows = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]


def _finite(value: Any) -> Any:
    """JSON has no numbers that are not finite: they become texts."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str) -> None:
    """One line of progress."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: list[str] | None = None, sections: Sequence[Section] = BEFORE_RANKS) -> int:
    """0 where numerics held, 1 where they did not or could not be judged, 130 after Ctrl-C."""
    arguments = parse(argv)
    device = find_device() if arguments.device == "auto" else arguments.device
    output = arguments.relative_to / arguments.output
    output.mkdir(parents=True, exist_ok=True)
    report = Report(output, device, arguments.minutes, small=arguments.small or device == "cpu")
    processes, interrupted = Processes(on_cpu=device == "cpu"), False
    with tempfile.TemporaryDirectory() as folder:
        try:
            for section in _sections(report, sections, arguments.only):
                run_section(report, processes, section, Path(folder))
                result = report.results[section.name]
                say(f"{section.name}: {result.status}, {result.seconds:.0f} s, {len(result.rows)} rows")
                report.write()
        except KeyboardInterrupt:
            interrupted = True
            report.write()
    found = verdict(report.results)
    for line in (*found["failures"], *found["missing"]):
        say(f"  {line}")
    say(f"numerics: {found['numerics']} ({found['comparisons']} comparisons); {report.output / 'report.html'}")
    return 130 if interrupted else 0 if found["numerics"] == HELD else 1


def _sections(report: Report, sections: Sequence[Section], only: list[str] | None) -> Iterator[Section]:
    """The sections one after the other; which ranks there can be is known after the first."""
    yield CONDITIONS
    if report.results["conditions"].status != "done":
        say(report.results["conditions"].error)
        return
    ranks = of_ranks(report.device, report.facts["devices"])
    for section in (*sections, *ranks):
        if only is None or section.name in only:
            yield section


if __name__ == "__main__":
    raise SystemExit(main())
