"""Small parts of the page as HTML. Every text in them is escaped."""

from __future__ import annotations

import html
import re
import time
from collections.abc import Mapping
from typing import Any

from mindspeed_simpo.studies.ui.runs import Run

_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")
_MEANINGS = {
    "running": "running",
    "stopping": "saving and stopping",
    "finished": "finished",
    "stopped": "stopped: Resume goes on from its newest checkpoint",
    "failed": "failed",
    "elsewhere": "running, started outside of the page",
    "ended": "over, started outside of the page",
}


def notice(kind: str, text: str) -> str:
    """A message of one or several lines; ``kind`` is good, bad, warn or hint."""
    lines = "<br>".join(html.escape(line) for line in text.splitlines())
    return f'<div class="notice {kind}" role="status">{lines}</div>' if text else ""


def plain(text: str) -> str:
    """A program's output without the codes of a terminal."""
    return _CONTROLS.sub("", text.replace("\r\n", "\n"))


def terminal(text: str) -> str:
    """What a program said, in a box that scrolls."""
    marked = re.sub(r"^(error|warning)(?=:)", r'<b class="\1">\1</b>', html.escape(plain(text)), flags=re.MULTILINE)
    return f'<pre class="terminal" tabindex="0">{marked}</pre>'


def checked(code: int, said: str) -> str:
    """The answer of ``check``: its errors and warnings first, then all that it said."""
    lines = plain(said).splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    warnings = [line for line in lines if line.startswith("warning: ")]
    verdict = "check: ready to train" if code == 0 else f"check: training would fail (exit code {code})"
    parts = [notice("good" if code == 0 else "bad", "\n".join([verdict, *errors])), notice("warn", "\n".join(warnings))]
    return "".join(parts) + terminal(said)


def state(run: Run) -> str:
    """State, progress and errors of a run."""
    facts = [f"{run.ranks} rank{'s' if run.ranks > 1 else ''}"] if run.ranks else []
    if run.seconds is not None:
        facts.append(time.strftime("%H:%M:%S", time.gmtime(run.seconds)))
    if run.exit_code is not None and not run.alive:
        facts.append(f"exit code {run.exit_code}")
    parts = [
        f'<div class="state" data-state="{run.state}"><span class="chip {run.state}">{_MEANINGS[run.state]}</span>'
        f"<b>{html.escape(run.name)}</b><span>{', '.join(facts)}</span></div>"
    ]
    if run.steps:
        parts.append(
            f'<div class="progress"><progress max="{run.steps}" value="{run.step}"></progress>'
            f"<span>step {run.step} of {run.steps}</span></div>"
        )
    elif run.alive:
        parts.append('<p class="hint">Preparing: the data are read and the model is built before the first step.</p>')
    if run.state == "failed":
        lost = "It ended without a last word: it was killed, or the host was restarted."
        parts.append(notice("bad", "\n".join(run.errors) or lost))
    return "".join(parts) + _summary(run.summary)


_CHANGES = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}


def _summary(summary: Mapping[str, Any]) -> str:
    """What changed from the first to the last evaluation, and the commands that go on."""
    before, after = summary.get("before"), summary.get("after")
    rows = []
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = [(name, before.get(key), after.get(key)) for key, name in _CHANGES.items()]
        changes = [f"{name} {a:.3f} → {b:.3f}" for name, a, b in pairs if _is_number(a) and _is_number(b)]
        rows.append(f"Held out, from the first to the last evaluation: {html.escape(', '.join(changes))}.")
    if summary.get("model_folder"):
        rows.append(f"The model: <code>{html.escape(str(summary['model_folder']))}</code>.")
    commands = summary.get("next_commands")
    if isinstance(commands, list):
        rows += [f"Next: <code>{html.escape(str(command))}</code>" for command in commands]
    return f'<div class="summary">{"<br>".join(rows)}</div>' if rows else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
