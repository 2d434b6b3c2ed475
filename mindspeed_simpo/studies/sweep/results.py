"""The results of a sweep: rows, ranked; the table on the terminal; ``sweep.json``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_simpo.studies.sweep.plan import CONFIG_FILE, Goal, Params, Plan, describe, show
from mindspeed_simpo.studies.sweep.trial import trial_folder
from mindspeed_simpo.studies.whole_file import write_whole

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One trial."""

    slot: int
    """Number of the trial in the sweep, from 0; its folder has the number too."""
    state: str
    """``waiting``, ``running``, ``failed``, ``infeasible`` (beyond the bound) or ``complete``."""
    params: Params
    value: float | None = None
    """The metric after the last step."""
    fall: float | None = None
    """Fall of ``logps/chosen`` from step 0 to the last step, nats per token; negative for a rise."""
    curve: Sequence[tuple[int, float | None, float]] = ()
    """Step, metric and ``logps/chosen`` of each evaluation."""
    final: Mapping[str, Any] | None = None
    """Every metric after the last step."""
    seconds: float | None = None
    """Time of the training in the process that ended it."""
    error: str | None = None


@dataclass(frozen=True)
class Results:
    """All trials of a sweep."""

    plan: Plan
    name: str
    """Name of the study."""
    rows: Sequence[Row]
    """The best first: complete trials by the metric, infeasible ones by the metric, failed ones, the others."""

    @property
    def best(self) -> Row | None:
        """The best trial within the bound; None where there is none."""
        return next((row for row in self.rows if row.state == "complete"), None)

    def next_command(self) -> str | None:
        """The command that trains with the values of the best trial; None where there is none."""
        return None if self.best is None else self.command(self.best)

    def command(self, row: Row) -> str:
        """The command that trains with the values of one trial."""
        keys = self.plan.keys_of(row.params)
        flags = {key: value for key, value in self.plan.flags.items() if key != "output_dir"} | keys
        if None in flags.values():  # a flag cannot say null
            return shlex.join(["mindspeed-simpo", "train", str(trial_folder(self.plan.folder, row.slot) / CONFIG_FILE)])
        words = [word for key, value in flags.items() for word in _words(key, value)]
        output = ["--output-dir", str(self.plan.folder / "best")]
        return shlex.join(["mindspeed-simpo", "train", self.plan.source, *words, *output])


def collect(plan: Plan, trials: Iterable[FrozenTrial | None], name: str) -> Results:
    """The results as the trials of the study have them."""
    rows = [_row(plan, slot, trial) for slot, trial in enumerate(trials)]
    return Results(plan, name, sorted(rows, key=lambda row: _rank(row, plan.goal)))


def explain(results: Results) -> str:
    """What the table says, in one or two sentences."""
    goal, best, rows = results.plan.goal, results.best, results.rows
    count = {state: sum(row.state == state for row in rows) for state in dict.fromkeys(row.state for row in rows)}
    text = f"{len(rows)} trials: {', '.join(f'{number} {state}' for state, number in count.items())}. "
    if best is None:
        within = (
            "" if goal.max_fall == float("inf") else f" with logps/chosen falling by at most {goal.max_fall:g} nats"
        )
        return text + f"No trial is complete{within}."
    return text + f"Best: trial {best.slot} ({describe(best.params)}), {goal.metric} {best.value:.4g}."


def terminal_table(results: Results) -> Table:
    """The trials, the best first, for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in header(results):
        table.add_column(name, overflow="fold")
    for row in results.rows:
        cells = [show(cell) if isinstance(cell, float) else str(cell) for cell in cells_of(results, row)]
        style = {"infeasible": "yellow", "failed": "red"}.get(row.state, "bold" if row is results.best else "")
        table.add_row(*map(Text, cells), style=style)
    return table


def header(results: Results) -> list[str]:
    """Names of the columns of the tables."""
    return ["rank", "trial", *results.plan.space.parameters, results.plan.goal.metric, "fall of logps/chosen", "state"]


def cells_of(results: Results, row: Row) -> list[object]:
    """The cells of one trial; an infeasible or failed one has no rank."""
    rank: object = results.rows.index(row) + 1 if row.state == "complete" else "-"
    params = [show(row.params[name]) if name in row.params else "-" for name in results.plan.space.parameters]
    state = f"failed: {row.error.splitlines()[0]}" if row.error else row.state
    return [rank, row.slot, *params, *("-" if number is None else number for number in (row.value, row.fall)), state]


def write_json(results: Results, path: Path) -> None:
    """Write the results for programs, completely or not at all."""
    plan, best = results.plan, results.best
    bound = plan.goal.max_fall
    content = {
        "study": results.name,
        "metric": plan.goal.metric,
        "direction": plan.goal.direction,
        "max_logps_fall": None if bound == float("inf") else bound,
        "trials": [_record(plan, row) for row in results.rows],
        "best": None if best is None else {"trial": best.slot, "command": results.next_command()},
    }
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _record(plan: Plan, row: Row) -> dict[str, Any]:
    return {
        "trial": row.slot,
        "state": row.state,
        "folder": str(trial_folder(plan.folder, row.slot)),
        "parameters": row.params,
        "keys": plan.keys_of(row.params),
        "value": row.value,
        "logps_fall": row.fall,
        "metrics": row.final,
        "evaluations": [dict(zip(("step", "value", "logps/chosen"), point, strict=True)) for point in row.curve],
        "seconds": row.seconds,
        "error": row.error,
    }


def _row(plan: Plan, slot: int, trial: FrozenTrial | None) -> Row:
    if trial is None:
        return Row(slot, "waiting", {})
    attributes = trial.user_attrs
    params = trial.params or trial.system_attrs.get("fixed_params", {})
    if not trial.state.is_finished():
        return Row(slot, trial.state.name.lower(), params)
    if "error" in attributes:
        return Row(slot, "failed", params, error=attributes["error"])
    return Row(
        slot,
        "infeasible" if attributes["fall"] > plan.goal.max_fall else "complete",
        params,
        value=attributes["final"][plan.goal.metric],
        fall=attributes["fall"],
        curve=[tuple(point) for point in attributes["evaluations"]],
        final=attributes["final"],
        seconds=attributes["seconds"],
    )


def _rank(row: Row, goal: Goal) -> tuple[Any, ...]:
    """Order of the rows; of equal metrics the smaller fall of ``logps/chosen`` is better."""
    order = ("complete", "infeasible", "failed", "running", "waiting").index(row.state)
    if row.value is None or row.fall is None:
        return order, 0.0, 0.0, row.slot
    return order, row.value if goal.minimize else -row.value, row.fall, row.slot


def _words(key: str, value: Any) -> list[str]:
    flag = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return [f"--{flag}", *value]
    return [f"--{flag}", json.dumps(value) if isinstance(value, list | dict) else str(value)]
