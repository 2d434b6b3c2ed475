"""The closing summary of a run: what was trained, before and after, alarms, where the model is, what to do next."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.training.best import Best
from mindspeed_simpo.training.progress import console, shown_time

logger = logging.getLogger(__name__)

FILE = "summary.json"
_NEXT = "next"
_SHOWN = {
    "loss": ("loss", ".4f"),
    "rewards/accuracies": ("accuracy", ".3f"),
    "rewards/margins": ("margin", "+.3f"),
    "logps/chosen": ("logps/chosen", ".3f"),
    "answer_tokens": ("answer tokens", ".1f"),
}
"""Metric -> its name and format in the summary."""


Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    status: str
    """``finished``, ``stopped_early`` or ``stopped_by_signal``."""
    step: int
    """Steps completed."""
    exported_step: int | None
    """Step whose model is in ``hf/``; None where nothing was exported."""
    best: Best | None
    signal: str | None = None


@dataclass(frozen=True)
class Facts:
    """What the summary says of the run beside its ending and its lines."""

    config: Config
    root: Path
    train_iters: int
    pairs: int
    """Training pairs."""
    held_out_pairs: int
    ranks: int
    seconds: float
    """Since this start of the program."""
    first_step: int
    """Of this start: of the loaded checkpoint, or 0."""
    checkpoint_of: Callable[[int], Path]
    """The folder of the checkpoint of a step."""


def close(facts: Facts, ending: Ending, lines: Lines, alarms: Lines) -> None:
    """Write ``summary.json`` and show the summary on stderr.

    Args:
        facts: Of the run.
        ending: How it ended.
        lines: The first and the last line of the split ``eval``; fewer where there are no such.
        alarms: The lines of the split ``alarm``.

    Raises:
        OSError: where the file cannot be written.
    """
    summary = _summary(facts, ending, lines, alarms)
    path = facts.root / FILE
    unfinished = path.with_name(f".{FILE}.incomplete")
    unfinished.write_text(json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)
    rows = list(_rows(facts, summary))
    if console.is_terminal:
        table = Table.grid(padding=(0, 2))
        for name, text in rows:
            if name != _NEXT:
                table.add_row(f"[bold]{name}[/]", escape(text))
        console.print(Panel(table, title="Summary", title_align="left", expand=False))
        for command in summary["next_commands"]:  # lines of their own, to be copied
            console.print(f"{_NEXT}: {escape(command)}", soft_wrap=True, highlight=False)
    for name, text in rows:
        logger.info("%s: %s", name, text, extra={"printed": console.is_terminal})


def _summary(facts: Facts, ending: Ending, lines: Lines, alarms: Lines) -> dict[str, Any]:
    config, best = facts.config, ending.best
    best_step = None if best is None else best.step
    found_best = None
    if best is not None and best_step is not None:
        found_best = best.model_dump(include={"metric", "greater", "value", "step"})
        found_best["checkpoint"] = str(facts.checkpoint_of(best_step))
    trained = {
        "model": config.model_name_or_path,
        "backend": config.backend,
        "adapters": {"lora_r": config.lora_r, "lora_alpha": config.lora_alpha_in_use} if config.lora_r else None,
        "objective": {"stage": config.stage, **config.keys_of(config.objective).model_dump()},
        "pref_ftx": config.pref_ftx,
        "lr": config.lr,
        "pairs": facts.pairs,
        "held_out_pairs": facts.held_out_pairs,
        "steps": ending.step,
        "train_iters": facts.train_iters,
        "ranks": facts.ranks,
        "seconds": round(facts.seconds, 1),
        "first_step_of_this_start": facts.first_step,
    }
    exported = ending.exported_step is not None
    return {
        "status": ending.status,
        "signal": ending.signal,
        "trained": trained,
        "before": lines[0] if lines else None,
        "after": lines[-1] if len(lines) > 1 else None,
        "best": found_best,
        "alarms": [{name: alarm[name] for name in ("step", "alarm", "message", "advice")} for alarm in alarms],
        "model_folder": str(facts.root / "hf") if exported else None,
        "exported_step": ending.exported_step,
        "checkpoint": str(facts.checkpoint_of(ending.step)),
        "next_commands": list(_next_commands(facts, ending, exported=exported)),
    }


def _next_commands(facts: Facts, ending: Ending, *, exported: bool) -> Iterator[str]:
    recorded = str(facts.root / "config.yaml")
    if ending.status == "stopped_by_signal":
        yield _on_ranks(["train", recorded, "--load", "auto"], facts.ranks)
        return
    chosen = ending.best.step if ending.best is not None and ending.best.step is not None else ending.step
    checkpoint = str(facts.checkpoint_of(chosen))
    if not exported:
        output = str(facts.root / "hf")
        yield shlex.join(["mindspeed-simpo", "export", "--checkpoint", checkpoint, "--output", output])
    held_out = [] if facts.held_out_pairs else ["--eval-data-path", "HELD_OUT.jsonl"]
    yield _on_ranks(["evaluate", recorded, "--load", checkpoint, *held_out], facts.ranks)


def _on_ranks(words: Sequence[str], ranks: int) -> str:
    """The command line of a command on as many ranks as this run has."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if ranks > local:
        return f"torchrun ... -m mindspeed_simpo {shlex.join(words)}"
    return shlex.join(["mindspeed-simpo", *words, *(["--nproc-per-node", str(ranks)] if ranks > 1 else [])])


def _rows(facts: Facts, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The summary as names and texts."""
    trained = summary["trained"]
    keys = ", ".join(f"{name} {value}" for name, value in trained["objective"].items() if name != "stage")
    adapters = f", adapters of r {facts.config.lora_r}" if facts.config.lora_r else ""
    yield (
        "trained",
        f"{trained['model']}{adapters}, {facts.config.objective.title}" + (f" ({keys})" if keys else ""),
    )
    how = {"finished": "", "stopped_early": ", stopped early", "stopped_by_signal": f", stopped by {summary['signal']}"}
    resumed = f" since step {facts.first_step}" if facts.first_step else ""
    yield (
        "steps",
        f"{trained['steps']} of {trained['train_iters']}{how[summary['status']]}, {trained['pairs']} pairs, "
        f"{shown_time(trained['seconds'])}{resumed}",
    )
    yield from _evaluations(summary, trained["held_out_pairs"])
    alarms = summary["alarms"]
    yield "alarms", "; ".join(f"{alarm['alarm']} at step {alarm['step']}" for alarm in alarms) or "none"
    folder = summary["model_folder"]
    yield "model", f"{folder}, of step {summary['exported_step']}" if folder else "not exported"
    yield "checkpoint", summary["checkpoint"]
    for command in summary["next_commands"]:
        yield _NEXT, command


def _evaluations(summary: Mapping[str, Any], pairs: int) -> Iterator[tuple[str, str]]:
    before, after, best = summary["before"], summary["after"], summary["best"]
    if before is None:
        yield "held out", "no evaluation"
        return
    parts = []
    for metric, (name, form) in _SHOWN.items():
        values = [line.get(metric) for line in (before, after) if line is not None]
        parts += [f"{name} " + " -> ".join(format(value, form) for value in values)] if None not in values else []
    steps = f"step {before['step']}" + (f" -> step {after['step']}" if after is not None else "")
    yield f"held out, {pairs} pairs", f"{', '.join(parts)} ({steps})"
    if best is not None:
        first = before.get(best["metric"]) if before["step"] == 0 else None
        worse = first is not None and (best["value"] - first) * (1 if best["greater"] else -1) <= 0
        note = f"; no better than {first:.4f} before training" if worse else ""
        yield "best", f"{best['metric']} {best['value']:.4f} at step {best['step']}, {best['checkpoint']}{note}"


def remove(root: Path) -> None:
    """Remove the summary of an earlier start, which says nothing of this one."""
    (root / FILE).unlink(missing_ok=True)
