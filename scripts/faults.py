"""Faults at random moments of training and saving, each followed by a resume: what is lost, how soon a run ends.

    python -m scripts.faults --cycles 100 --seed 0

Each cycle starts a run of two ranks, causes one fault, waits for the end of all processes, verifies every checkpoint,
goes on with the same command (``load: auto``) and compares parameters, optimizer state and metrics with those of a run
without faults, bit by bit. The result is a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.fault_kinds import FAULTS, Fault, NotAllowedError
from scripts.fault_run import SETTINGS, Launched, differences, problems_of
from scripts.machine import processor, versions


@dataclass(frozen=True)
class Outcome:
    """What one cycle showed."""

    fault: str
    setting: str
    code: int
    """Exit code of the run with the fault."""
    seconds: float
    """From the fault to the end of all processes."""
    problems: tuple[str, ...]
    """Damaged checkpoints, processes that outlive the run, other numbers than without the fault; none is expected."""


def cycle(fault: Fault, setting: str, expected: Path, folder: Path, chance: random.Random) -> Outcome:
    """One run with a fault, and its resumption.

    Args:
        fault: What happens to the run.
        setting: Name of a setting.
        expected: Output folder of a run without faults.
        folder: An empty folder.
        chance: Draws the moment and the victim.
    """
    run = Launched(folder, setting)
    try:
        fault.wait_for_moment(run, chance)
        begin = time.monotonic()
        fault.strike(run, chance)
        code = run.wait()
        seconds = time.monotonic() - begin
        problems = [f"process {pid} outlives the run" for pid in run.survivors()]
        problems += problems_of(run.output)
        if code not in fault.codes:
            problems.append(f"exit code {code}, expected one of {sorted(fault.codes)}: {run.stderr()}")
        fault.afterwards(run, chance)
        code_after = Launched(folder, setting).wait()
        if code_after != 0:
            problems.append(f"the resumed run ends with {code_after}: {run.stderr()}")
        problems += differences(run.output, expected)
    finally:
        fault.clean_up(run)
        run.kill()
    return Outcome(fault.name, setting, code, seconds, tuple(problems))


def campaign(
    cycles: int, seed: int, folder: Path, names: Sequence[str], settings: Sequence[str]
) -> tuple[list[Outcome], list[str]]:
    """The outcomes of ``cycles`` cycles, each fault in turn, and the faults that this machine does not allow."""
    chance = random.Random(seed)
    expected = {}
    for setting in settings:
        run = Launched(folder / "expected" / setting, setting)
        if run.wait() != 0:
            raise SystemExit(f"error: the run without faults fails: {run.stderr()}")
        expected[setting] = run.output
    outcomes: list[Outcome] = []
    skipped: list[str] = []
    faults = [FAULTS[name] for name in names]
    for number in range(cycles):
        fault, setting = faults[number % len(faults)], chance.choice(settings)
        try:
            outcomes.append(cycle(fault, setting, expected[setting], folder / f"cycle{number:04d}", chance))
        except NotAllowedError as reason:
            skipped.append(f"{fault.name}: {reason}")
            continue
        shutil.rmtree(folder / f"cycle{number:04d}", ignore_errors=True)
        latest = outcomes[-1]
        said = "; ".join(latest.problems) or "nothing lost"
        sys.stderr.write(f"{number + 1}/{cycles} {fault.name} ({setting}): ended with {latest.code} ")
        sys.stderr.write(f"after {latest.seconds:.1f} s, {said}\n")
    return outcomes, sorted(set(skipped))


def table(outcomes: Sequence[Outcome]) -> str:
    """The Markdown table of a campaign."""
    by_fault: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_fault[outcome.fault].append(outcome)
    head = ("fault", "cycles", "exit codes", "seconds to the end, median and longest", "lost or different")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, part in by_fault.items():
        seconds = sorted(outcome.seconds for outcome in part)
        codes = ", ".join(map(str, sorted({outcome.code for outcome in part})))
        lost = sum(bool(outcome.problems) for outcome in part)
        middle = seconds[len(seconds) // 2]
        lines.append(f"| {name} | {len(part)} | {codes} | {middle:.1f}, {seconds[-1]:.1f} | {lost} |")
    lost = sum(bool(outcome.problems) for outcome in outcomes)
    lines.append(f"| **all** | {len(outcomes)} | | {max(outcome.seconds for outcome in outcomes):.1f} | {lost} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a campaign and print its table; 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="default: all")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        outcomes, skipped = campaign(
            arguments.cycles, arguments.seed, Path(folder), arguments.faults, arguments.settings
        )
    found = versions()
    sys.stdout.write(
        f"{len(outcomes)} cycles, seed {arguments.seed}; {processor()}, {len(os.sched_getaffinity(0))} cores, "
    )
    sys.stdout.write(f"torch {found['torch']}, megatron-core {found['megatron-core']}, {found['date']}\n\n")
    sys.stdout.write(table(outcomes) + "\n")
    sys.stdout.writelines(f"not run: {reason}\n" for reason in skipped)
    return 1 if any(outcome.problems for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
