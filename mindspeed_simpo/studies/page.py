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
from mindspeed_simpo.studies.whole_file import write_whole

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_DIR = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """A titled part of a page: figures, HTML below them, or both."""

    title: str
    how_to_read: str
    """One sentence."""
    figure: Figure | Sequence[Figure] | None = None
    """Several stand side by side where the page is wide enough, below each other elsewhere."""
    body: str = ""
    """HTML; text in it has passed :func:`html.escape`."""

    @property
    def figures(self) -> Sequence[Figure]:
        """The figures, from left to right."""
        if self.figure is None:
            return ()
        return tuple(self.figure) if isinstance(self.figure, tuple | list) else (self.figure,)


def write_page(path: Path, title: str, sections: Sequence[Section], summary: str = "", style: str = "") -> None:
    """Write a page, completely or not at all.

    Args:
        path: The file, ``*.html``; its folder exists.
        title: Title of the page.
        sections: In their order.
        summary: HTML below the title.
        style: CSS of the page's own classes; colours and fonts are there already, see ``page.html``.

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
        "STYLE": style,
        "SUMMARY": summary,
        "SECTIONS": "\n".join(parts),
        "PLOTLY": get_plotlyjs() if any(section.figures for section in sections) else "",
    }
    text = re.sub(r"<!--([A-Z]+)-->", lambda place: values[place[1]], text)
    write_whole(path, text)


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
    places = []
    for index, figure in enumerate(section.figures):
        name = f"figure{number}-{index}"
        # within a script element `</` and `<!--` have meanings of their own
        text = json.dumps(json.loads(figure.to_json()), ensure_ascii=False).replace("<", "\\u003c")
        parts.append(f'<script type="application/json" data-figure="{name}">{text}</script>')
        height = f' style="height: {figure.layout.height:.0f}px"' if figure.layout.height else ""
        places.append(f'<div class="figure" id="{name}"{height}></div>')
    if places:
        parts.append(f'<div class="beside">{"".join(places)}</div>')
    return f"<section>{''.join(parts)}{section.body}</section>"
