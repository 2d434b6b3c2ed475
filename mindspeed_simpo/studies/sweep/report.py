"""The page of a sweep: its table, and figures of the metric over parameters, steps and the fall of ``logps/chosen``."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindspeed_simpo.studies.page import Section, table, write_page
from mindspeed_simpo.studies.sweep.plan import describe, show
from mindspeed_simpo.studies.sweep.results import Results, Row, cells_of, explain, header

_STYLES = {"complete": ("#2563a8", "circle"), "infeasible": ("#d08a1d", "x")}
"""State -> colour and symbol of its trials."""
_MAX_CURVES = 30
"""Trials whose curves are drawn, the best ones."""


def write_report(results: Results, path: Path) -> None:
    """Write the page, completely or not at all.

    Raises:
        ConfigError: where plotly is not installed.
    """
    done = [row for row in results.rows if row.value is not None]
    rows = [cells_of(results, row) for row in results.rows]
    reading = (
        "The best trial is first; a trial beyond the bound on the fall of logps/chosen or a failed one has no rank."
    )
    sections = [Section("Trials", reading, body=table(header(results), rows))]
    if done:
        sections += [_by_parameter(results, done, name) for name in results.plan.space.parameters]
        sections += _together(results, done)
        sections += [_against_fall(results, done), _over_steps(results, done)]
    if failed := [row for row in results.rows if row.error]:
        texts = [f"<h3>trial {row.slot}: {html.escape(describe(row.params))}</h3>{_pre(row.error)}" for row in failed]
        sections.append(Section("Failed trials", "The last lines that each training printed.", body="".join(texts)))
    write_page(path, f"Sweep: {results.plan.source}", sections, _summary(results))


def _summary(results: Results) -> str:
    goal, command = results.plan.goal, results.next_command()
    bound = "no bound on the fall of logps/chosen"
    if goal.max_fall != float("inf"):
        bound = f"logps/chosen may fall by at most {goal.max_fall:g} nats per token from step 0 to the last step"
    parts = [f"<p>{html.escape(explain(results))}</p>"]
    what = f"{goal.direction} {goal.metric} of the held-out pairs after the last step; {bound}."
    parts.append(f'<p class="reading">{html.escape(what)}</p>')
    if command is not None:
        parts.append(f"<p>Train with the values of the best trial:</p>{_pre(command)}")
    return "".join(parts)


def _pre(text: str | None) -> str:
    return f"<pre>{html.escape(text or '')}</pre>"


def _by_parameter(results: Results, done: Sequence[Row], name: str) -> Section:
    from plotly import graph_objects as go

    goal = results.plan.goal
    figure = go.Figure()
    for state, rows in _by_state(done).items():
        values = [_axis_value(results, row, name) for row in rows]
        figure.add_trace(
            go.Scatter(
                x=values,
                y=[row.value for row in rows],
                mode="markers",
                name=state,
                marker={"color": _STYLES[state][0], "symbol": _STYLES[state][1], "size": 10},
                text=[_hover(row) for row in rows],
                hoverinfo="text",
            )
        )
    figure.update_layout(xaxis=_axis(results, done, name), yaxis={"title": {"text": goal.metric}}, showlegend=True)
    end = "lower" if goal.minimize else "higher"
    return Section(
        f"{goal.metric} by {name}",
        f"One mark is one trial, {end} is better; marks above the same value differ in the other parameters.",
        figure,
    )


def _together(results: Results, done: Sequence[Row]) -> list[Section]:
    """Two parameters as a map, more as parallel coordinates, one as neither."""
    names = results.plan.space.parameters
    if len(names) < 2:
        return []
    return [_map(results, done, *names) if len(names) == 2 else _parallel(results, done)]


def _map(results: Results, done: Sequence[Row], across: str, up: str) -> Section:
    from plotly import graph_objects as go

    figure = go.Figure()
    numbers = [row.value for row in done if row.value is not None]
    for state, rows in _by_state(done).items():
        figure.add_trace(
            go.Scatter(
                x=[_axis_value(results, row, across) for row in rows],
                y=[_axis_value(results, row, up) for row in rows],
                mode="markers",
                name=state,
                marker={
                    "color": [row.value for row in rows],
                    "coloraxis": "coloraxis",
                    "symbol": _STYLES[state][1],
                    "size": 18,
                },
                text=[_hover(row) for row in rows],
                hoverinfo="text",
            )
        )
    figure.update_layout(
        xaxis=_axis(results, done, across),
        yaxis=_axis(results, done, up),
        coloraxis={"colorscale": "Viridis", "cmin": min(numbers), "cmax": max(numbers)},
        showlegend=True,
    )
    goal = results.plan.goal
    end = "darker" if goal.minimize else "lighter"
    return Section(f"{across} and {up}", f"One mark is one trial, {end} colours are better {goal.metric}.", figure)


def _parallel(results: Results, done: Sequence[Row]) -> Section:
    from plotly import graph_objects as go

    goal = results.plan.goal
    lines = [_dimension(results, done, name) for name in results.plan.space.parameters]
    lines.append({"label": goal.metric, "values": [row.value for row in done]})
    lines.append({"label": "fall", "values": [row.fall for row in done]})
    colours = {"color": [row.value for row in done], "colorscale": "Viridis", "showscale": False}
    figure = go.Figure(go.Parcoords(dimensions=lines, line=colours, labelside="bottom", domain={"x": [0.04, 0.96]}))
    reading = f"One line is one trial, coloured by {goal.metric}; fall is that of logps/chosen, dragging keeps a range."
    return Section("All parameters together", reading, figure)


def _dimension(results: Results, done: Sequence[Row], name: str) -> dict[str, Any]:
    values = [_axis_value(results, row, name) for row in done]
    if _is_numeric(results, name) and all(isinstance(value, int | float) for value in values):
        return {"label": name, "values": values, "tickformat": ".1e" if max(map(abs, values)) < 1e-3 else ".3~g"}
    texts = list(dict.fromkeys(map(str, values)))
    places = [texts.index(str(value)) for value in values]
    return {"label": name, "values": places, "tickvals": list(range(len(texts))), "ticktext": texts}


def _against_fall(results: Results, done: Sequence[Row]) -> Section:
    from plotly import graph_objects as go

    goal = results.plan.goal
    figure = go.Figure()
    for state, rows in _by_state(done).items():
        figure.add_trace(
            go.Scatter(
                x=[row.fall for row in rows],
                y=[row.value for row in rows],
                mode="markers",
                name=state,
                marker={"color": _STYLES[state][0], "symbol": _STYLES[state][1], "size": 10},
                text=[_hover(row) for row in rows],
                hoverinfo="text",
            )
        )
    if goal.max_fall != float("inf"):
        figure.add_vline(x=goal.max_fall, line={"color": "#b3402f", "dash": "dash"})
    axis = {"title": {"text": "fall of logps/chosen, nats per token"}}
    figure.update_layout(xaxis=axis, yaxis={"title": {"text": goal.metric}}, showlegend=True)
    return Section(
        f"{goal.metric} against the fall of logps/chosen",
        "Further to the right the chosen answers became less likely; trials beyond the dashed line are infeasible.",
        figure,
    )


def _over_steps(results: Results, done: Sequence[Row]) -> Section:
    from plotly import graph_objects as go

    shown = done[:_MAX_CURVES]
    figure = go.Figure()
    for row in shown:
        steps, values = [point[0] for point in row.curve], [point[1] for point in row.curve]
        dash = "solid" if row.state == "complete" else "dot"
        figure.add_trace(
            go.Scatter(x=steps, y=values, mode="lines+markers", name=f"trial {row.slot}", line={"dash": dash},
                       text=[_hover(row)] * len(steps), hoverinfo="text+x+y")
        )  # fmt: skip
    metric = results.plan.goal.metric
    figure.update_layout(xaxis={"title": {"text": "step"}}, yaxis={"title": {"text": metric}}, showlegend=True)
    best = f" of the best {len(shown)}" if len(shown) < len(done) else ""
    reading = (
        f"One line is one trial{best}, dotted where it is infeasible; set eval_interval for points between the ends."
    )
    return Section(f"{metric} over the steps", reading, figure)


def _by_state(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {state: found for state in _STYLES if (found := [row for row in rows if row.state == state])}


def _hover(row: Row) -> str:
    return f"trial {row.slot}<br>{html.escape(describe(row.params))}<br>{row.value:.4g}, fall {row.fall:.3g}"


def _is_numeric(results: Results, name: str) -> bool:
    space = results.plan.space
    choices = space.grid.get(name, ())
    return name in space.search or (
        bool(choices) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in choices)
    )


def _axis_value(results: Results, row: Row, name: str) -> Any:
    value = row.params[name]
    return value if _is_numeric(results, name) else show(value)


def _axis(results: Results, done: Sequence[Row], name: str) -> dict[str, Any]:
    """The axis of a parameter: logarithmic for a logarithmic range and for numbers that differ tenfold."""
    axis: dict[str, Any] = {"title": {"text": name}, "exponentformat": "e"}
    if not _is_numeric(results, name):
        return axis | {"type": "category"}
    found = results.plan.space.search.get(name)
    values = [row.params[name] for row in done]
    tenfold = min(values) > 0 and max(values) >= 10 * min(values)
    return axis | {"type": "log" if tenfold or (found is not None and found.log) else "linear"}
