"""``sweep``: trainings with different values, compared by the held-out pairs."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from mindspeed_simpo.cli import flags, launch
from mindspeed_simpo.cli.command import Command, parse_nproc
from mindspeed_simpo.config.recipes import sweep_path
from mindspeed_simpo.errors import ConfigError

_MAX_TRIALS = 10_000


def _sweep(command: Any, _argv: Sequence[str]) -> int:
    if launch.in_launched_rank():
        raise ConfigError("sweep starts the ranks of each trial itself: start it without torchrun, on each host once")
    from mindspeed_simpo.studies.sweep.plan import Goal, better, make_plan
    from mindspeed_simpo.studies.sweep.results import explain, terminal_table
    from mindspeed_simpo.studies.sweep.space import read_space
    from mindspeed_simpo.studies.sweep.worker import run_sweep
    from mindspeed_simpo.training.progress import set_up_logging

    nproc = parse_nproc(command.nproc_per_node)
    given = flags.given(command)
    if "load" in given:
        raise ConfigError("--load: the sweep sets it: an interrupted trial goes on from its own checkpoint")
    file = None if command.file is None else sweep_path(command.file)
    space = read_space(command.grid, command.search, file, str(given.get("stage", "simpo")))
    direction = command.direction or better(command.metric)
    if direction not in ("maximize", "minimize"):
        raise ConfigError(f"--direction: expected maximize or minimize, found {direction!r}")
    goal = Goal(command.metric, direction == "minimize", _bound(command.max_logps_fall))
    plan = make_plan(command.config, given, space, goal, _trials(command.trials), nproc)
    set_up_logging(is_main=True)
    results, code = run_sweep(
        plan, command.storage, command.study_name, launch.start_program, nproc, retry_failed=command.retry_failed
    )
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, soft_wrap=not sys.stdout.isatty())
    console.print(terminal_table(results))
    lines = [explain(results), f"Page: {plan.folder / 'index.html'}"]
    if (next_command := results.next_command()) is not None:
        lines.append(f"Train with the values of the best trial:\n  {next_command}")
    sys.stdout.write("\n".join(lines) + "\n")
    return code


def _trials(text: str | None) -> int | None:
    if text is None:
        return None
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number <= _MAX_TRIALS:
        raise ConfigError(f"--trials: expected a whole number from 1 to {_MAX_TRIALS}, found {text!r}")
    return number


def _bound(text: str) -> float:
    try:
        bound = float(text)
    except ValueError:
        bound = math.nan
    if not bound >= 0:
        raise ConfigError(f"--max-logps-fall: expected nats per token of at least 0, or inf for none, found {text!r}")
    return bound


def _text(help_text: str, metavar: str) -> Any:
    return Annotated[str | None, tyro.conf.arg(help=help_text, metavar=metavar)]


_GRID = Annotated[
    tyro.conf.UseAppendAction[list[str]],
    tyro.conf.arg(
        help="Values of a key, written as in YAML; may be given several times. Without --trials every combination is "
        "run once.",
        metavar="KEY=VALUE,...",
    ),
]
_SEARCH = Annotated[
    tyro.conf.UseAppendAction[list[str]],
    tyro.conf.arg(
        help="Range of a key, drawn from uniformly, with :log by its logarithm; needs --trials; may be given several "
        "times.",
        metavar="KEY=LOW:HIGH[:log]",
    ),
]
_FILE = _text(
    "YAML file with the sections points (named sets of keys), grid and search, or the name of a shipped sweep: "
    "simpo_ablations.",
    "FILE",
)
_TRIALS = _text("Number of trials to draw by Optuna's TPE. Default: every combination of the grid once.", "N")
_METRIC = Annotated[
    str, tyro.conf.arg(help="Metric of the held-out pairs after the last step that is compared.", metavar="NAME")
]
_DIRECTION = _text("Default: minimize for losses, else maximize.", "{maximize,minimize}")
_FALL = Annotated[
    str,
    tyro.conf.arg(
        help="Bound on the fall of logps/chosen of the held-out pairs from step 0 to the last step, nats per token; a "
        "trial beyond it cannot be the best one. inf: no bound.",
        metavar="NATS",
    ),
]
_STORAGE = _text(
    "Database of the trials by URL, for several hosts, such as postgresql://user@host/name. Default: the SQLite file "
    "sweep.db in output_dir.",
    "URL",
)
_STUDY = Annotated[str, tyro.conf.arg(help="Name of the sweep in the database.", metavar="NAME")]
_RETRY = Annotated[bool, tyro.conf.arg(help="Run the trials again that failed.")]

COMMAND = Command(
    "sweep",
    "Train with each combination of values, or search for good ones, and compare by the held-out pairs; the same "
    "command goes on after a kill.",
    _sweep,
    arguments=(
        ("grid", _GRID, dataclasses.field(default_factory=list)),
        ("search", _SEARCH, dataclasses.field(default_factory=list)),
        ("file", _FILE, dataclasses.field(default=None)),
        ("trials", _TRIALS, dataclasses.field(default=None)),
        ("metric", _METRIC, dataclasses.field(default="rewards/accuracies")),
        ("direction", _DIRECTION, dataclasses.field(default=None)),
        ("max_logps_fall", _FALL, dataclasses.field(default="0.5")),
        ("storage", _STORAGE, dataclasses.field(default=None)),
        ("study_name", _STUDY, dataclasses.field(default="sweep")),
        ("retry_failed", _RETRY, dataclasses.field(default=False)),
    ),
    configured=True,
    on_ranks=True,
)
