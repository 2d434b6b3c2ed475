"""Parts of the pages in ``docs/`` that scripts write: ``<!-- NAME: begin -->`` to ``<!-- NAME: end -->``."""

from __future__ import annotations

from pathlib import Path


def write_marked(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the markers of ``name``.

    Args:
        page: The Markdown file.
        name: Of the markers.
        text: Without the empty lines at its begin and end.

    Raises:
        SystemExit: where the page does not have each marker once.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    whole = page.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1:
        raise SystemExit(f"error: {page}: expected the markers {begin} and {end} once each")
    before, after = whole.split(begin)[0], whole.split(end)[1]
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
