"""The curves, warnings and sample answers of runs, from ``metrics.jsonl`` and ``samples.jsonl``."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.studies.page import missing_extra, table
from mindspeed_simpo.studies.ui.root import Root
from mindspeed_simpo.studies.ui.runs import folder_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Line = dict[str, Any]

_COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#a855f7", "#ef4444", "#14b8a6")
_CHOSEN, _REJECTED = "#16a34a", "#dc2626"
_MOST_POINTS = 1000
_MOST_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Panel:
    """One figure: its metrics over the steps."""

    title: str
    metrics: tuple[str, ...]
    how_to_read: str


PANELS = (
    Panel("Loss", ("loss",), "What training makes small; the held-out loss should fall with it."),
    Panel(
        "Accuracy", ("rewards/accuracies",), "Share of pairs whose chosen answer has the larger reward; 0.5 is chance."
    ),
    Panel("Margin", ("rewards/margins",), "Reward of the chosen answer minus that of the rejected one."),
    Panel(
        "Log-probabilities",
        ("logps/chosen", "logps/rejected"),
        "Of chosen (green) and rejected (red) answers; both may fall, rejected ones should fall faster.",
    ),
    Panel("Gradient norm", ("grad_norm",), "Before clipping; a sudden rise warns of a learning rate that is too high."),
    Panel("Learning rate", ("learning_rate",), "Warm-up, then decay."),
)


def read_lines(root: Root, run: str, file: str) -> list[Line]:
    """The objects of a JSON lines file of a run; lines that are not whole are left out.

    Raises:
        ConfigError: where the run or the file lies outside of the root folder, or the file is too large for a page.
    """
    path = root.inside(str(folder_of(root, run) / file), file)
    lines = []
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{run}: {file} is larger than {_MOST_BYTES >> 20} MiB: look at it with TensorBoard")
        with path.open(encoding="utf-8", errors="replace") as text:
            for line in text:
                try:
                    found = json.loads(line)
                except ValueError:
                    continue
                if isinstance(found, dict) and isinstance(found.get("step"), int):
                    lines.append(found)
    except OSError:
        return []
    return lines


def state_of(root: Root, runs: Sequence[str]) -> tuple[Any, ...]:
    """What changes when the curves or answers of runs change."""
    found = []
    for run in runs:
        for file in ("metrics.jsonl", "samples.jsonl"):
            try:
                facts = root.inside(str(folder_of(root, run) / file), file).stat()
                found.append((run, facts.st_mtime_ns, facts.st_size))
            except OSError:
                found.append((run, 0, 0))
    return tuple(found)


def figures(lines: Mapping[str, Sequence[Line]]) -> list[Figure]:
    """One figure for each of :data:`PANELS`.

    Args:
        lines: Name of a run -> lines of its ``metrics.jsonl``.

    Raises:
        ConfigError: where plotly is not installed.
    """
    try:
        from plotly import graph_objects
    except ImportError:
        raise ConfigError(missing_extra("ui", "plotly")) from None
    return [_figure(graph_objects, panel, lines) for panel in PANELS]


def alarms(lines: Sequence[Line]) -> str:
    """The alarms of a run as HTML; an empty text where there is none."""
    found = [line for line in lines if line.get("split") == "alarm"]
    items = "".join(
        f"<li><b>step {line['step']}: {html.escape(str(line.get('message', line.get('alarm', ''))))}</b>"
        f"<br>{html.escape(str(line.get('advice', '')))}</li>"
        for line in found[-10:]
    )
    return f'<div class="notice warn"><ul>{items}</ul></div>' if found else ""


def sample_steps(samples: Sequence[Line]) -> list[int]:
    """The steps that have answers, the newest first."""
    return sorted({line["step"] for line in samples}, reverse=True)


def answers(samples: Sequence[Line], step: int | None) -> str:
    """The sample answers as an HTML table: those of one step, or of every step, prompt by prompt."""
    if not samples:
        return (
            '<p class="hint">No answers. With <code>eval_generate: 4</code> each evaluation of the run answers four '
            "held-out prompts, which are shown here.</p>"
        )
    if step is None:
        chosen = sorted(samples, key=lambda line: (line.get("index", 0), line["step"]))
    else:
        chosen = sorted((line for line in samples if line["step"] == step), key=lambda line: line.get("index", 0))
    rows = [(line["step"], _short(line.get("prompt")), _short(line.get("answer"))) for line in chosen[:200]]
    return table(("step", "prompt", "answer"), rows)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 2000 else f"{text[:2000]} ..."


def _figure(graph_objects: Any, panel: Panel, lines: Mapping[str, Sequence[Line]]) -> Figure:
    figure = graph_objects.Figure()
    for number, (run, points) in enumerate(lines.items()):
        for metric in panel.metrics:
            for split in ("train", "eval"):
                steps, values = _curve(points, split, metric)
                if not steps:
                    continue
                several = len(panel.metrics) > 1
                colour = _COLOURS[number % len(_COLOURS)]
                if several and len(lines) == 1:
                    colour = _CHOSEN if metric.endswith("chosen") else _REJECTED
                parts = [run] if len(lines) > 1 else []
                parts += [metric.rpartition("/")[2]] if several else []
                parts.append("held-out" if split == "eval" else "train")
                figure.add_scatter(
                    x=steps,
                    y=values,
                    name=", ".join(parts),
                    mode="lines+markers" if split == "eval" or len(steps) < 3 else "lines",
                    line={
                        "color": colour,
                        "width": 2,
                        "dash": "dot"
                        if split == "eval" or (several and len(lines) > 1 and "rej" in metric)
                        else "solid",
                    },
                    marker={"size": 7, "symbol": "circle" if split == "train" else "diamond"},
                )
    figure.update_layout(
        height=250,
        margin={"l": 52, "r": 12, "t": 28, "b": 34},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom", "font": {"size": 11}},
        hovermode="x unified",
        uirevision=",".join(lines),
        showlegend=bool(figure.data),
    )
    figure.update_xaxes(rangemode="tozero", gridcolor="rgba(128,128,128,.22)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(128,128,128,.22)", zerolinecolor="rgba(128,128,128,.4)", exponentformat="e")
    if not figure.data:
        figure.add_annotation(text="no line yet", showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper")
        figure.update_xaxes(visible=False)
        figure.update_yaxes(visible=False)
    return figure


def _curve(lines: Sequence[Line], split: str, metric: str) -> tuple[list[int], list[float | None]]:
    """Steps and values, thinned to what a screen can show; None where a value was not finite."""
    points = [(line["step"], line[metric]) for line in lines if line.get("split") == split and metric in line]
    stride = -(-len(points) // _MOST_POINTS) or 1
    kept = points[::stride]
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return [step for step, _ in kept], [value for _, value in kept]
