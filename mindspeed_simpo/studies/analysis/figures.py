"""The figures of an analysis, each drawn from the numbers in ``analysis.json`` alone."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mindspeed_simpo.studies.analysis.scores import Numbers

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# of the page, which has each of them for dark and light; told apart by readers who see no red or green
MODELS = ("var(--first)", "var(--second)")
CHOSEN, REJECTED = "var(--chosen)", "var(--rejected)"
_INK, _QUIET = "var(--ink)", "var(--soft)"
_DENSITY = [[0, "rgba(58,134,200,0)"], [0.05, "rgba(58,134,200,.18)"], [1, "rgba(58,134,200,1)"]]
_CELLS = [[0, "rgba(58,134,200,.04)"], [1, "rgba(58,134,200,.6)"]]
_HEIGHT = 360
_ROW = 46
"""Height of a bar that lies, pixels."""


def margins(models: Sequence[Numbers]) -> tuple[Figure, ...]:
    """Distribution of the reward margins, one panel a model: each objective has its own unit of rewards."""
    return tuple(_margins(model, colour) for model, colour in zip(models, MODELS, strict=False))


def _margins(model: Numbers, colour: str) -> Figure:
    figure = _figure(_label(model), "reward margin (chosen − rejected)", "pairs")
    figure.add_trace(_histogram(model["margins"], colour, "margin"))
    mean = model["margins"]["mean"]
    figure.add_vline(x=0, line={"color": _INK, "width": 1})
    figure.add_vline(x=mean, line={"color": _INK, "width": 2, "dash": "dash"})
    figure.update_layout(showlegend=False, bargap=0)
    return figure


def likelihoods(models: Sequence[Numbers]) -> tuple[Figure, ...]:
    """Distributions of the average log-probabilities of chosen and rejected responses."""
    return tuple(_likelihoods(model) for model in models)


def _likelihoods(model: Numbers) -> Figure:
    figure = _figure(_label(model), "average log-probability, nats per token", "responses")
    for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
        trace = _histogram(model["mean_logprobs"][side], colour, side)
        figure.add_trace(trace.update(opacity=0.55))
    figure.update_layout(barmode="overlay", bargap=0)
    return figure


def accuracy_by_length(models: Sequence[Numbers]) -> Figure:
    """Accuracy of the rewards by length difference, with the interval of each group."""
    figure = _figure(None, "tokens of chosen − tokens of rejected", "accuracy")
    for model, colour in zip(models, MODELS, strict=False):
        groups = model["accuracy"]["by_length_difference"]
        names = [_range(group) for group in groups]
        figure.add_trace(_accuracies(model, groups, names, colour))
    figure.add_hline(y=0.5, line={"color": _QUIET, "width": 1, "dash": "dot"})
    figure.update_yaxes(range=[0, 1.05], tickformat=".0%")
    figure.update_xaxes(type="category", tickangle=-40, automargin=True)
    figure.update_layout(barmode="group")
    return figure


def accuracy_by_source(models: Sequence[Numbers]) -> Figure:
    """Accuracy of the rewards by source of the pairs, bars that lie."""
    sources = models[0]["accuracy"]["by_source"]
    figure = _figure(None, "accuracy", None, height=130 + _ROW * len(sources) * len(models))
    for model, colour in zip(models, MODELS, strict=False):
        groups = model["accuracy"]["by_source"]
        names = [f"{_text(group['source'], 28)} ({group['pairs']})" for group in groups]
        figure.add_trace(_accuracies(model, groups, names, colour, lying=True))
    figure.add_vline(x=0.5, line={"color": _QUIET, "width": 1, "dash": "dot"})
    figure.update_xaxes(range=[0, 1.05], tickformat=".0%")
    figure.update_yaxes(type="category", autorange="reversed", automargin=True)
    figure.update_layout(barmode="group")
    return figure


def lengths(models: Sequence[Numbers]) -> tuple[Figure, ...]:
    """Density of the responses by length and average log-probability."""
    return tuple(_lengths(model) for model in models)


def _lengths(model: Numbers) -> Figure:
    from plotly.graph_objects import Heatmap

    grid, rho = model["length_density"], model["spearman"]["both"]
    name = f"{_label(model)}: Spearman ρ = {_signed(rho)}"
    figure = _figure(name, "response length, tokens", "nats per token")
    counts = [list(column) for column in zip(*grid["counts"], strict=True)]
    figure.add_trace(
        Heatmap(
            x=grid["length_edges"],
            y=grid["mean_logprob_edges"],
            z=counts,
            colorscale=_DENSITY,
            showscale=False,
            hovertemplate="%{x:.0f} tokens, %{y:.2f} nats per token: %{z} responses<extra></extra>",
        )
    )
    ticks = _round_lengths(grid["length_edges"][0], grid["length_edges"][-1])
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[str(tick) for tick in ticks])
    return figure


def rankings(models: Sequence[Numbers]) -> tuple[Figure, ...]:
    """The contingency table of reward ranking against likelihood ranking."""
    words = ("reward right", "reward wrong"), ("likelihood right", "likelihood wrong")
    return tuple(
        _table(
            f"{_label(model)}: {model['contingency']['disagreement']:.1%} disagree",
            words,
            _cells(model["contingency"], "reward_right_only", "likelihood_right_only"),
        )
        for model in models
    )


def agreement(models: Sequence[Numbers], both: Numbers) -> Figure:
    """Which pairs each of two models ranks as the data do."""
    run, against = map(_label, models)
    words = (f"{run} right", f"{run} wrong"), (f"{against} right", f"{against} wrong")
    return _table(None, words, _cells(both, "run_right_only", "against_right_only"))


def displacement(models: Sequence[Numbers]) -> tuple[Figure, ...]:
    """Change of the average log-probabilities over training, one panel a model that has a history."""
    return tuple(_displacement(model) for model in models if model["displacement"])


def _displacement(model: Numbers) -> Figure:
    from plotly.graph_objects import Scatter

    figure = _figure(_label(model), "step", "change, nats per token")
    for split, numbers in model["displacement"].items():
        held_out = split == "eval"
        for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
            line = {"color": colour, "width": 2.5 if held_out else 1, "dash": "solid" if side == "chosen" else "dash"}
            figure.add_trace(
                Scatter(
                    x=numbers["step"],
                    y=numbers[f"{side}_change"],
                    name=f"{side}, {'held out' if held_out else 'train'}",
                    mode="lines+markers" if held_out else "lines",
                    opacity=1 if held_out else 0.55,
                    line=line,
                )
            )
    figure.add_hline(y=0, line={"color": _QUIET, "width": 1})
    if model["step"] is not None:
        figure.add_vline(x=model["step"], line={"color": _QUIET, "width": 1, "dash": "dot"})
    return figure


def _figure(title: str | None, across: str | None, upward: str | None, height: int = _HEIGHT) -> Figure:
    from plotly.graph_objects import Figure

    figure = Figure()
    figure.update_layout(template="none", height=height, hoverlabel={"namelength": -1})
    if title is not None:
        figure.update_layout(title={"text": title, "font": {"size": 15}, "x": 0.5, "xanchor": "center"})
    axis = {"showline": False, "zeroline": False, "ticks": "", "automargin": True}
    figure.update_xaxes(title={"text": across, "standoff": 8}, showgrid=False, **axis)
    figure.update_yaxes(title={"text": upward, "standoff": 8}, **axis)
    return figure


def _histogram(numbers: Numbers, colour: str, name: str) -> Any:
    from plotly.graph_objects import Bar

    edges, counts = numbers["histogram"]["edges"], numbers["histogram"]["counts"]
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    return Bar(
        x=middles, y=counts, width=edges[1] - edges[0], marker={"color": colour, "line": {"width": 0}}, name=name
    )


def _accuracies(
    model: Numbers, groups: Sequence[Numbers], names: Sequence[str], colour: str, lying: bool = False
) -> Any:
    from plotly.graph_objects import Bar

    shares = [group["accuracy"] for group in groups]
    intervals = [group["interval"] or (0, 0) for group in groups]
    above = [high - (share or 0) for (_, high), share in zip(intervals, shares, strict=True)]
    below = [(share or 0) - low for (low, _), share in zip(intervals, shares, strict=True)]
    bars = {"array": above, "arrayminus": below, "color": _INK, "thickness": 1.2, "width": 4}
    values = {"x": shares, "y": names, "error_x": bars} if lying else {"x": names, "y": shares, "error_y": bars}
    return Bar(
        **values,
        orientation="h" if lying else "v",
        name=_label(model),
        marker={"color": colour},
        customdata=[[group["right"], group["pairs"]] for group in groups],
        hovertemplate="%{customdata[0]} of %{customdata[1]} pairs right<extra>" + _label(model) + "</extra>",
    )


def _table(title: str | None, words: tuple[Sequence[str], Sequence[str]], cells: Sequence[Sequence[int]]) -> Figure:
    """Two rows and two columns of numbers of pairs, with their shares."""
    from plotly.graph_objects import Heatmap

    rows, columns = words
    total = sum(map(sum, cells)) or 1
    figure = _figure(title, None, None, height=280)
    figure.add_trace(
        Heatmap(
            x=columns, y=rows, z=cells, colorscale=_CELLS, zmin=0, zmax=total, showscale=False, xgap=3, ygap=3,
            hovertemplate="%{y}, %{x}: %{z} pairs<extra></extra>",
        )
    )  # fmt: skip
    for row, numbers in zip(rows, cells, strict=True):
        for column, number in zip(columns, numbers, strict=True):
            text = f"<b>{number / total:.1%}</b><br>{number}"
            figure.add_annotation(x=column, y=row, text=text, showarrow=False, font={"size": 16})
    figure.update_yaxes(autorange="reversed", tickangle=-90, showgrid=False)
    figure.update_xaxes(side="bottom")
    return figure


def _cells(numbers: Numbers, right_of_rows: str, right_of_columns: str) -> list[list[int]]:
    return [[numbers["both_right"], numbers[right_of_rows]], [numbers[right_of_columns], numbers["both_wrong"]]]


def _round_lengths(low: float, high: float) -> list[int]:
    """1, 2, 5, 10, ... within limits; powers of ten alone where these would be many."""
    powers = [10**power for power in range(7)]
    ticks = [first * power for power in powers for first in (1, 2, 5) if low <= first * power <= high]
    return ticks if len(ticks) <= 8 else [tick for tick in ticks if tick in powers]


def _range(group: Numbers) -> str:
    low, high = group["from"], group["to"]
    return f"{low:+d}" if low == high else f"{low:+d} to {high:+d}"


def _signed(value: float | None) -> str:
    return "not defined" if value is None else f"{value:+.2f}"


def _label(model: Numbers) -> str:
    return _text(model["label"], 40)


def _text(text: str, longest: int) -> str:
    """Text for a figure, where tags would be markup; the end of a long one, which tells paths apart."""
    return html.escape(text if len(text) <= longest else f"…{text[1 - longest :]}", quote=False)
