"""The tables, sentences and picture of ``scripts/plan_curves.py``, from its points alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from xml.sax.saxutils import escape

Point = dict[str, Any]
TITLES = {
    "128": "Strong scaling, 128 pairs a step",
    "1024": "Strong scaling, 1,024 pairs a step",
    "weak": "Weak scaling, 4 pairs of each NPU a step",
}
_COLOURS = ("#2a6f97", "#c1440e", "#4f772d", "#7b2cbf")


def _models(points: Iterable[Point]) -> list[str]:
    return list(dict.fromkeys(point["model"] for point in points))


def _curve(points: Iterable[Point], scaling: str, model: str) -> list[Point]:
    """The points of one curve, with the rate of an NPU over that of the smallest number on which the model fits."""
    found = [dict(point) for point in points if point["scaling"] == scaling and point["model"] == model]
    first = next((point["rate"] for point in found if "rate" in point), 0.0)
    for point in found:
        if "rate" in point:
            point["efficiency"] = point["rate"] / first
    return found


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def efficiencies(points: Sequence[Point]) -> str:
    """For each kind of scaling a table: the rate of an NPU, the efficiency and the largest loss of each model."""
    models, parts = _models(points), []
    for scaling, title in TITLES.items():
        curves = [_curve(points, scaling, model) for model in models]
        rows = [[f"{each[0]['devices']:,}", *map(_cell, each)] for each in zip(*curves, strict=True)]
        parts.append(f"**{title}**, simulated\n\n{_table(['NPUs', *models], rows)}")
    return "\n\n".join(parts)


def _cell(point: Point) -> str:
    if "rate" not in point:
        return _missing(point)
    loss, share = _loss(point)
    return f"{point['rate']:.3g}, {point['efficiency']:.0%}; {loss} {share:.0%}"


def _missing(point: Point) -> str:
    needed = point.get("needed_gib")
    return "no layout allowed" if needed is None else f"does not fit: {needed:.0f} GiB"


def _loss(point: Point) -> tuple[str, float]:
    """The largest part of a step beside computation."""
    return max(((name, share) for name, share in point["parts"].items() if name != "computation"), key=lambda it: it[1])


def full_tables(points: Sequence[Point]) -> str:
    """Every point with its layout, what its step is spent on, and how far others are from it."""
    header = [
        *("NPUs", "pairs a step", "fastest layout", "s a step", "pairs/s of an NPU", "efficiency"),
        *("spent on", "script's layout", "default budget"),
    ]
    parts = [
        "# Scaling, simulated\n\nWritten by `python -m scripts.plan_curves --write-docs`; "
        "[scaling.md](../scaling.md#layouts-from-8-to-4096-npus) says what is compared."
    ]
    for scaling, title in TITLES.items():
        for model in _models(points):
            rows = [_row(point) for point in _curve(points, scaling, model)]
            parts.append(f"**{model}: {title[0].lower()}{title[1:]}**\n\n{_table(header, rows)}")
    return "\n\n".join(parts)


def _row(point: Point) -> list[str]:
    cells = [f"{point['devices']:,}", f"{point['pairs']:,}"]
    if "rate" not in point:
        return [*cells, _missing(point), "", "", "", "", "", ""]
    spent = ", ".join(f"{name} {share:.0%}" for name, share in point["parts"].items() if share >= 0.03)
    numbers = f"{point['seconds']:.3g}", f"{point['rate']:.3g}", f"{point['efficiency']:.0%}"
    return [*cells, point["layout"], *numbers, spent, _factor(point["script"]), _factor(point["default_budget"])]


def _factor(value: float | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.2f} x"


def findings(points: Sequence[Point]) -> str:
    """What the points say about defaults, as a list of sentences."""
    fitting = [point for point in points if "rate" in point]
    keys = [point["keys"] for point in fitting]
    tensor = [each for each in keys if each["tensor"] > 1]
    deep = [each for each in keys if each["pipeline"] > 1]
    total = len(keys)
    shared, plain = (
        sum(each[name] == value for each in keys)
        for name, value in (("batching", "prefix_shared"), ("recompute", None))
    )
    lines = [
        f"- `batching: prefix_shared`, the default, is that of the fastest layout in {shared} of {total} points"
        f"{_verdict(shared / total)}.",
        f"- `sequence_parallel` is on in {sum(each['sequence_parallel'] for each in tensor)} of the {len(tensor)} "
        "fastest layouts with tensor parallelism, and off by default"
        f"{_verdict(1 - sum(each['sequence_parallel'] for each in tensor) / max(1, len(tensor)))}.",
        f"- Virtual stages: in {sum(each['virtual'] for each in deep)} of the {len(deep)} fastest with a pipeline.",
        f"- No recomputation, the default, in {plain} of {total} points{_verdict(plain / total)}; "
        f"`pair_schedule: concat`, the default, in {sum(each['pair_schedule'] == 'concat' for each in keys)}.",
        f"- At most 8 tensor ranks in {sum(each['tensor'] <= 8 for each in keys)} of {total} points; tensor and "
        f"context ranks together on one host of 8 in {sum(each['tensor'] * each['context'] <= 8 for each in keys)}.",
        "- The default `max_tokens_per_micro_batch`, with the degrees of the fastest layout: "
        + _spread([point["default_budget"] for point in fitting if point["default_budget"] is not None]),
    ]
    for model in _models(points):
        of_model = [point for point in fitting if point["model"] == model]
        if of_model:
            lines.append(f"- The script's layout of {model}: {_spread([point['script'] for point in of_model])}")
    return "\n".join(lines)


def _verdict(share: float) -> str:
    """What the share of points in which a default is the fastest says about it."""
    if share >= 0.75:
        return ": a good default"
    return ": not a good default" if share < 0.25 else ": it depends on the size"


def _spread(factors: Sequence[float | str]) -> str:
    """Of some factors the share that is close, and the largest."""
    numbers = [each for each in factors if not isinstance(each, str)]
    words = {word: sum(each == word for each in factors) for word in ("does not fit", "not allowed")}
    rest = "".join(f", {word} in {number}" for word, number in words.items() if number)
    if not numbers:
        return f"{len(factors)} points{rest}."
    near = sum(each <= 1.05 for each in numbers)
    return (
        f"within 5 % of the fastest in {near} of {len(factors)} points, {sorted(numbers)[len(numbers) // 2]:.2f} x in "
        f"the median and {max(numbers):.2f} x at most{rest}."
    )


def picture(points: Sequence[Point]) -> str:
    """The efficiencies as SVG: a panel for each kind of scaling."""
    width, height, left, top = 330, 240, 50, 36
    models = _models(points)
    whole = f'viewBox="0 0 {len(TITLES) * (width + left) + 20} {height + top + 70}"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {whole} font-family="sans-serif" font-size="11">']
    for panel, (scaling, title) in enumerate(TITLES.items()):
        x0 = left + panel * (width + left)
        lines.append(f'<text x="{x0}" y="{top - 14}" font-size="13">{escape(title)}</text>')
        curves = [_curve(points, scaling, model) for model in models]
        sizes = [point["devices"] for point in curves[0]]
        largest = max(1.0, *(point.get("efficiency", 0.0) for curve in curves for point in curve))
        places = {size: x0 + width * number / max(1, len(sizes) - 1) for number, size in enumerate(sizes)}
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            y = top + height * (1 - share / largest)
            lines.append(f'<path d="M{x0} {y:.1f}h{width}" stroke="#ddd"/>')
            lines.append(f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
        lines += [
            f'<text x="{x:.1f}" y="{top + height + 16}" text-anchor="middle">{size}</text>'
            for size, x in places.items()
        ]
        for colour, curve in zip(_COLOURS, curves, strict=False):
            dots = [
                f"{places[point['devices']]:.1f},{top + height * (1 - point['efficiency'] / largest):.1f}"
                for point in curve
                if "efficiency" in point
            ]
            lines.append(f'<polyline points="{" ".join(dots)}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for number, (colour, model) in enumerate(zip(_COLOURS, models, strict=False)):
        x, y = left + 190 * number, top + height + 46
        lines.append(f'<path d="M{x} {y - 4}h24" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<text x="{x + 30}" y="{y}">{escape(model)}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"
