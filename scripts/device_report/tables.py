"""Tables and bars of each section."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from mindspeed_simpo.studies.page import table

Row = dict[str, Any]


def bars(values: Sequence[tuple[str, float]], shown: str = "{:.3g}", wrong: Sequence[bool] | None = None) -> str:
    """A horizontal bar for each named value."""
    most = max((value for _, value in values if math.isfinite(value)), default=0.0) or 1.0
    parts = []
    for number, (name, value) in enumerate(values):
        width = 100 * value / most if math.isfinite(value) else 100.0
        kind = " not" if wrong is not None and wrong[number] else ""
        parts.append(
            f"<span>{html.escape(name)}</span><div class='bar{kind}' style='width:{width:.1f}%'></div>"
            f"<span>{shown.format(value)}</span>"
        )
    return f"<div class='bars'>{''.join(parts)}</div>"


def conditions(rows: Sequence[Row]) -> list[str]:
    """Facts, and the lines of env_report.sh."""
    if not rows:
        return []
    facts = rows[0]
    shown = [
        (key, f"{facts[key] / 2**30:.1f} GiB" if key.endswith("_bytes") and facts[key] else str(facts[key]))
        for key in ("device", "product", "devices", "memory_bytes", "processor", "cores", "host_memory_bytes",
                    "load_average", "reduced_precision_products")
    ]  # fmt: skip
    lines = html.escape("\n".join(facts["environment"]))
    return [table(("", ""), shown), f"<details><summary>env_report.sh</summary><pre>{lines}</pre></details>"]


def comparisons(rows: Sequence[Row]) -> list[str]:
    """Share of the bound by case, the worst first; then all."""
    judged = [row for row in rows if "error" in row]
    refused = [row for row in rows if "refused" in row]
    worst: dict[str, Row] = {}
    for row in judged:
        name = f"{row['case']}, {row['dtype']}"
        if name not in worst or not _share(row) <= _share(worst[name]):
            worst[name] = row
    ranked = sorted(worst.items(), key=lambda item: -_share(item[1]))
    parts = []
    if ranked:
        values = [(name, _share(row)) for name, row in ranked[:15]]
        parts.append("<p class='soft'>Largest errors as shares of their bounds:</p>")
        parts.append(bars(values, "{:.1%}", [not row["holds"] for _, row in ranked[:15]]))
    listed = [
        (row["case"], row.get("model", ""), row["dtype"], row["of"], row["error"], row["bound"],
         "yes" if row["holds"] else "NO")
        for row in judged
    ]  # fmt: skip
    header = ("case", "model", "dtype", "of", "error", "bound", "holds")
    parts.append(f"<details><summary>All {len(listed)}</summary>{table(header, listed)}</details>")
    if refused:
        parts.append(table(("case", "dtype", "refused"), [(r["case"], r["dtype"], r["refused"]) for r in refused]))
    return parts


def _share(row: Row) -> float:
    """Error over bound; a bound of zero is passed by zero alone."""
    error, bound = float(row["error"]), float(row["bound"])
    if error != error:
        return float("inf")
    return error / bound if bound else (0.0 if not error else float("inf"))


def rates(rows: Sequence[Row]) -> list[str]:
    """Each rate."""
    return [table(("", ""), [(key, value) for key, value in rows[0].items()])] if rows else []


def speed(rows: Sequence[Row]) -> list[str]:
    """A row a lever; bars of pairs a second."""
    if not rows:
        return []
    header = ("lever", "s", "pairs/s", "tokens/s", "times the first", "MFU, data sheet", "MFU, measured products",
              "useful", "peak GiB", "expected GiB", "ratio")  # fmt: skip
    listed = [
        (
            row["lever"],
            row["seconds"],
            row["pairs_per_second"],
            row["tokens_per_second"],
            row["times_base"],
            _percent(row["mfu"]),
            _percent(row["mfu_of_matmul"]),
            _percent(row["useful_mfu_of_matmul"]),
            row["peak_bytes"] / 2**30,
            row["expected_bytes"] / 2**30,
            row["expected_over_peak"],
        )
        for row in rows
    ]
    first = rows[0]
    said = (
        f"{first['layers']} of {first['layers_of_model']} layers; {first['pairs']} pairs a step. Bars: pairs a second."
    )
    values = [(row["lever"], row["pairs_per_second"]) for row in rows]
    return [f"<p>{said}</p>", bars(values), table(header, listed)]


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def head(rows: Sequence[Row]) -> list[str]:
    """Seconds and their ratio to the bare products."""
    header = ("head", "tokens", "hidden", "vocabulary", "dtype", "s", "times bare products", "TFLOP/s", "extra GiB")
    listed = [
        (
            row["head"],
            row["tokens"],
            row["hidden"],
            row["vocabulary"],
            row["dtype"],
            row["seconds"],
            row["times_bare"] or 1.0,
            row["flops_per_second"] / 1e12,
            "not counted" if row["extra_bytes"] is None else row["extra_bytes"] / 2**30,
        )
        for row in rows
    ]
    return [bars([(row["head"], row["seconds"]) for row in rows], "{:.3g} s"), table(header, listed)] if rows else []


def kernels(rows: Sequence[Row]) -> list[str]:
    """Whether attention is what it should be; the slowest kernels of each step; what the package said."""
    said = [line for row in rows if "said" in row for line in row["said"]]
    rows = [row for row in rows if "kernels" in row]
    header = ("lever", "dtype", "as expected", "attention", "dense", "calls", "s")
    listed = [
        (
            row["lever"],
            row["dtype"],
            "yes" if row["as_expected"] else "NO",
            ", ".join(row["attention"]) or "none",
            ", ".join(row["dense_attention"]) or "none",
            row["calls"],
            row["seconds"],
        )
        for row in rows
    ]
    parts = [table(header, listed)] if rows else []
    for row in rows:
        inner = [(each["name"], each["calls"], each["seconds"], _percent(each["share"])) for each in row["kernels"]]
        title = html.escape(f"{row['lever']}, {row['dtype']}: {len(inner)} of {row['number_of_kernels']} kernels")
        parts.append(f"<details><summary>{title}</summary>{table(('kernel', 'calls', 's', 'share'), inner)}</details>")
    return parts + [f"<p>{html.escape(line)}</p>" for line in said]


def waits(rows: Sequence[Row]) -> list[str]:
    """Counts and places."""
    notes = sorted({row["method"] for row in rows if "method" in row})
    places = ["; ".join(f"{place} ({count})" for place, count in row["places"].items()) or "none" for row in rows]
    listed = [(row["lever"], row["waits"], where) for row, where in zip(rows, places, strict=True)]
    header = ("lever", "host synchronisations a step", "where")
    return [*(f"<p>{html.escape(note)}</p>" for note in notes), table(header, listed)] if rows else []


def ranks(rows: Sequence[Row]) -> list[str]:
    """Numerics and speed of layouts, and collectives."""
    parts = [f"<p>Backend {html.escape(row['backend'])}.</p>" for row in rows if "backend" in row]
    if any("case" in row for row in rows):
        parts += comparisons(rows)
    layouts = [row for row in rows if "layout" in row]
    if layouts:
        listed = [(row["layout"], row["seconds"], row["pairs_per_second"], row["tokens_per_second"]) for row in layouts]
        parts.append(table(("layout", "s", "pairs/s", "tokens/s"), listed))
    collectives = [row for row in rows if "collective" in row]
    if collectives:
        listed = [(row["collective"], 4 * row["numbers"], row["seconds"], row["rate"] / 1e9) for row in collectives]
        parts.append(table(("collective", "bytes", "s", "GB/s"), listed))
    return parts
