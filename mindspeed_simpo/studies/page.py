"""Self-contained pages of figures: one HTML file that needs no network, in dark and in light, wide or narrow."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_simpo.errors import ConfigError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_DIR = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """A titled part of a page: a figure, HTML below it, or both."""

    title: str
    how_to_read: str
    """One sentence."""
    figure: Figure | None = None
    body: str = ""
    """HTML; text in it has passed :func:`html.escape`."""


def write_page(path: Path, title: str, sections: Sequence[Section], summary: str = "") -> None:
    """Write a page, completely or not at all.

    Args:
        path: The file, ``*.html``; its folder exists.
        title: Title of the page.
        sections: In their order.
        summary: HTML below the title.

    Raises:
        ConfigError: where plotly is not installed.
        OSError: where the file cannot be written.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError(missing_extra("studies", "plotly")) from None
    parts = [_section(number, section) for number, section in enumerate(sections)]
    text = (_DIR / "page.html").read_text(encoding="utf-8")
    values = {
        "TITLE": html.escape(title),
        "SUMMARY": summary,
        "SECTIONS": "\n".join(parts),
        "PLOTLY": get_plotlyjs() if any(section.figure is not None for section in sections) else "",
    }
    text = re.sub(r"<!--([A-Z]+)-->", lambda place: values[place[1]], text)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """HTML of a table that scrolls sideways where it is wider than the page.

    Args:
        header: Names of the columns.
        rows: Cells; numbers are aligned to the right, other values are written as text.
    """
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def missing_extra(extra: str, package: str) -> str:
    """The message where a package of an extra is not installed."""
    return f"{package} is not installed: pip install 'mindspeed-simpo[{extra}]'"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f'<td class="number">{value:.4g}</td>'
    kind = ' class="number"' if isinstance(value, int) else ""
    return f"<td{kind}>{html.escape(str(value))}</td>"


def _section(number: int, section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>", f'<p class="reading">{html.escape(section.how_to_read)}</p>']
    if section.figure is not None:
        # in a script element only `</` could end the JSON early
        text = json.dumps(json.loads(section.figure.to_json())).replace("</", "<\\/")
        parts.append(f'<div class="figure" id="figure{number}"></div>')
        parts.append(f'<script type="application/json" data-figure="figure{number}">{text}</script>')
    return f"<section>{''.join(parts)}{section.body}</section>"
