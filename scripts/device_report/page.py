"""The report as one page: tables and bars, no script, no file beside it, in light and dark, on a phone too."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scripts.device_report import tables

Row = dict[str, Any]

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5b6577; --paper: #fff; --line: #d9dee7; --accent: #2563a8;
  --good: #0f8a76; --bad: #c4312f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --soft: #9aa5b8; --paper: #14181f; --line: #2d3542;
  --accent: #7ab3ef; --good: #3fc1a9; --bad: #f0705f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1000px; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 0 0 .25rem; }
section { border-top: 1px solid var(--line); padding: 1.25rem 0 .5rem; }
.reading, .soft { color: var(--soft); margin: 0 0 .5rem; }
.held { color: var(--good); } .not { color: var(--bad); }
.wide { overflow-x: auto; } pre { white-space: pre-wrap; font-size: .8rem; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .5rem; text-align: left; vertical-align: top;
  overflow-wrap: normal; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.bars { display: grid; grid-template-columns: minmax(0, 45%) 1fr auto; gap: .2rem .6rem; font-size: .85rem;
  margin: .5rem 0 1rem; align-items: center; }
.bar { background: var(--accent); height: .8rem; border-radius: 2px; min-width: 2px; }
.bar.not { background: var(--bad); }
summary { cursor: pointer; padding: .35rem 0; }
"""


def page(report: Mapping[str, Any]) -> str:
    """HTML of what ``report.json`` has."""
    said, sections = report["verdict"], report["sections"]
    rows = sections.get("conditions", {}).get("rows") or [{}]
    facts = rows[0]
    words = {"held": "Numerics held", "did not hold": "Numerics did not hold", "incomplete": "Numerics: incomplete"}
    state = "held" if said["numerics"] == "held" else "not"
    versions = ", ".join(f"{name} {number}" for name, number in facts.get("versions", {}).items())
    first = (
        f"<h1 class='{state}'>{words[said['numerics']]}</h1><p>{html.escape(_device(report, facts))}. "
        f"{html.escape(versions)}. {report['seconds']:.0f} seconds; {said['comparisons']} comparisons.</p>"
    )
    wrong = [*said["failures"], *said["missing"]]
    first += "".join(f"<p class='not'>{html.escape(line)}</p>" for line in wrong)
    body = "\n".join(_section(name, section) for name, section in sections.items())
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>Device report: {html.escape(_device(report, facts))}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{first}\n{body}\n</body>\n</html>\n"
    )


def _device(report: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    product = facts.get("product") or facts.get("processor") or ""
    shapes = ", small shapes" if report["small"] else ""
    return f"{report['device']}: {product}{shapes}"


_TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "conditions": tables.conditions,
    "operators": tables.comparisons,
    "models": tables.comparisons,
    "rates": tables.rates,
    "speed_1b": tables.speed,
    "speed_8b": tables.speed,
    "head": tables.head,
    "kernels": tables.kernels,
    "waits": tables.waits,
}


def _section(name: str, section: Mapping[str, Any]) -> str:
    parts = [f"<h2>{html.escape(section['title'])}</h2>", f"<p class='reading'>{html.escape(section['reading'])}</p>"]
    if section["status"] != "done":
        parts.append(f"<p class='not'>{html.escape(section['status'])}</p><pre>{html.escape(section['error'])}</pre>")
    rows = section["rows"]
    parts += _TABLES.get(name, tables.ranks)([row for row in rows if not {"crashed", "left_out"} & row.keys()])
    for row in rows:
        if "crashed" in row:
            what = row.get("case") or row.get("lever") or row.get("head") or row.get("shape") or ""
            parts.append(
                f"<details><summary class='not'>{html.escape(str(what))} {html.escape(row.get('dtype', ''))}: failed"
                f"</summary><pre>{html.escape(row['crashed'])}</pre></details>"
            )
    left = [row["left_out"] for row in rows if "left_out" in row]
    if left:
        parts.append(f"<p class='not'>Left out for lack of time: {html.escape('; '.join(left))}</p>")
    parts.append(f"<p class='soft'>{section['seconds']:.1f} s</p>")
    return f"<section id='{name}'>{''.join(parts)}</section>"
