"""The parity matrix: the engine at every claimed layout against a dense fp64 oracle, for every objective.

Prints, for each row, the relative error of the loss, the worst relative L2 error of a parameter's gradient and the same
of the parameters after one optimizer step. Exit code 1 where an error exceeds its bound.

    bash scripts/parity.sh                     # makes an environment, then runs all rows on both lines of megatron-core
    python -m scripts.parity --quick           # what continuous integration runs, on the installed line
    python -m scripts.parity --only "TP2 CP2"  # rows whose name has this in it; * stands for anything
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils import logging as transformers_logging

from scripts.machine import processor
from scripts.marked import write_marked
from tests.objectives import OBJECTIVES
from tests.ranks.matrix import GRADIENT, LOSS, PARAMETER, Cell, Matrix
from tests.ranks.matrix_rows import Row, all_rows, megatron_version, objectives_of, quick_objectives, quick_rows

DOCS = Path(__file__).parent.parent / "docs" / "numerics.md"
MEASURES = ("loss", "grad_norm", "gradient", "parameter")
HEADER = ("loss", "gradient norm", "worst gradient", "of", "worst parameter", "of")


def conditions(seconds: float, load: float) -> str:
    """Machine, versions and duration, in one sentence."""
    return (
        f"megatron-core {megatron_version()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores of {processor()} (load average {load:.0f} at the start), "
        f"{seconds / 60:.0f} minutes on {time.strftime('%Y-%m-%d')}"
    )


def chosen_rows(quick: bool, only: str | None) -> list[Row]:
    """Rows that the flags ask for; those of continuous integration, which have every pair of axes, come first."""
    rows = quick_rows() if quick else list(dict.fromkeys([*quick_rows(), *all_rows()]))
    if only is None:
        return rows
    return [row for row in rows if fnmatch.fnmatch(str(row).lower(), f"*{only.lower()}*")]


def worst_of(cells: Sequence[Cell], measure: str) -> Cell:
    """The cell that is furthest off; a number that is not finite is further than any other."""

    def distance(cell: Cell) -> float:
        value = float(getattr(cell, measure))
        return value if value == value else float("inf")

    return max(cells, key=distance)


def figures(cells: Sequence[Cell]) -> list[str]:
    """The worst of some cells by each measure, and the parameters that are meant."""
    loss, norm, gradient, parameter = (worst_of(cells, measure) for measure in MEASURES)
    return [
        f"{loss.loss:.1e}",
        f"{norm.grad_norm:.1e}",
        f"{gradient.gradient:.1e}",
        gradient.gradient_of.removeprefix("model."),
        f"{parameter.parameter:.1e}",
        parameter.parameter_of.removeprefix("model."),
    ]


def grouped(cells: Sequence[Cell], key: Callable[[Cell], object]) -> list[tuple[str, list[Cell]]]:
    """Cells under the name of their row or objective, in order."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(str(key(cell)), []).append(cell)
    return list(groups.items())


def tables(cells: Sequence[Cell], *, every_cell: bool) -> list[Table]:
    """By row (or by cell) and by objective."""
    by_row = Table("row", "objective" if every_cell else "ranks", *HEADER, title="Relative errors against the oracle")
    for name, group in grouped(cells, lambda cell: cell.row):
        if every_cell:
            for cell in group:
                by_row.add_row(name, cell.objective, *figures([cell]), style=None if cell.holds else "red")
            continue
        holds = all(cell.holds for cell in group)
        by_row.add_row(name, str(group[0].row.layout.ranks), *figures(group), style=None if holds else "red")
    by_objective = Table("objective", "rows", *HEADER, title="The same, worst of all rows")
    for name, group in grouped(cells, lambda cell: cell.objective):
        by_objective.add_row(name, str(len(group)), *figures(group))
    return [by_row, by_objective]


def markdown(cells: Sequence[Cell], note: str) -> str:
    """The tables as Markdown."""
    lines = [note + ".", ""]
    for title, key in (("objective", lambda cell: cell.objective), ("row", lambda cell: cell.row)):
        lines += ["| " + " | ".join((title, *HEADER)) + " |", "|---|" + "---|" * len(HEADER)]
        for name, group in grouped(cells, key):
            values = [f"`{value}`" if value[0].isalpha() else value for value in figures(group)]
            lines.append("| " + " | ".join((name, *values)) + " |")
        lines.append("")
    return "\n".join(lines)


def write_docs(text: str) -> None:
    """Put the tables of this line of megatron-core between its markers in docs/numerics.md."""
    line = ".".join(megatron_version().split(".")[:2])
    write_marked(DOCS, f"parity {line}", f"\n{text}")


def measure(rows: Sequence[Row], console: Console, *, quick: bool) -> tuple[list[Cell], list[str]]:
    """Cells of all rows, and the rows that could not run; Ctrl-C ends it with the rows so far."""
    cells: list[Cell] = []
    broken: list[str] = []
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(folder)
        for row in track(rows, "parity matrix", console=console):
            try:
                found = matrix.cells(row, quick_objectives(row) if quick else objectives_of(row))
            except KeyboardInterrupt:
                console.print("interrupted: the tables have the rows up to here", highlight=False)
                break
            except AssertionError as error:
                broken.append(str(row))
                console.print(f"{row}: failed to run: {error}", markup=False, highlight=False)
                continue
            cells += found
            said = "holds" if all(cell.holds for cell in found) else "OUT OF THE CONTRACT"
            console.print(f"{row}: {said}", markup=False, highlight=False)
    return cells, broken


def main(argv: Sequence[str] | None = None) -> int:
    """Run the matrix; 0 where everything holds, 1 where a row does not or was not run, 2 where no row was asked for."""
    parser = argparse.ArgumentParser(prog="python -m scripts.parity", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="only the rows that continuous integration runs")
    parser.add_argument("--only", metavar="PATTERN", help="only rows whose name has this in it; * stands for anything")
    parser.add_argument("--cells", action="store_true", help="a line for each objective of a row")
    parser.add_argument("--write-docs", action="store_true", help="write the tables of docs/numerics.md")
    args = parser.parse_args(argv)
    rows = chosen_rows(args.quick, args.only)
    if not rows:
        print(f"error: --only {args.only}: no such row; rows are named as 'TP2 SP CP2'", file=sys.stderr)  # noqa: T201
        return 2
    if args.write_docs and (args.quick or args.only):
        print("error: --write-docs needs the whole matrix: leave out --quick and --only", file=sys.stderr)  # noqa: T201
        return 2
    start, load = time.monotonic(), os.getloadavg()[0]
    cells, broken = measure(rows, Console(stderr=True), quick=args.quick)
    done = len({cell.row for cell in cells})
    note = f"{done} of {len(rows)} rows; " + conditions(time.monotonic() - start, load)
    console = Console(width=None if sys.stdout.isatty() else 180)
    for table in tables(cells, every_cell=args.cells):
        console.print(table)
    outside = sum(not cell.holds for cell in cells)
    console.print(
        f"{len(cells)} cells of {len(rows)} rows and {len(OBJECTIVES)} objectives; contract: loss {LOSS:.0e}, gradient "
        f"{GRADIENT:.0e}, parameter {PARAMETER:.0e}; outside of it: {outside}; rows that failed to run: {len(broken)}",
    )
    console.print(note, highlight=False)
    if args.write_docs and not broken:
        write_docs(markdown(cells, note))
    return 1 if outside or broken or done < len(rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
