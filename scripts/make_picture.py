"""Draw docs/quickstart.svg from a finished run of scripts/quickstart.sh.

python scripts/make_picture.py outputs/quickstart outputs/quickstart/start/hf configs/quickstart/held_out.jsonl
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

from before_after import arguments_parser, compare
from rich.console import Console, RenderableType
from rich.text import Text

OUTPUT = Path(__file__).parents[1] / "docs" / "quickstart.svg"
WIDTH = 108
COMMAND = "bash scripts/quickstart.sh"


def evaluation_lines(run_log: Path) -> Iterator[str]:
    """What a run says of its evaluations, without date and level."""
    for line in run_log.read_text(encoding="utf-8").splitlines():
        match = re.search(r" INFO (eval step .*)", line)
        if match:
            yield match.group(1)


def draw(lines: list[str], table: RenderableType) -> str:
    """A terminal with the command, the lines and the table, as SVG that refers to nothing outside of it."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text.assemble(("$ ", "bold green"), COMMAND))
    for line in lines:
        console.print(Text(line))
    console.print()
    console.print(table)
    svg = console.export_svg(title="mindspeed-simpo", unique_id="quickstart")
    # rich fetches its font from the network; any monospaced one serves, for every text states its own width
    svg = re.sub(r"@font-face\s*{[^}]*}\s*", "", svg).replace("Fira Code, monospace", "monospace")
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def main() -> None:
    """Draw the picture."""
    arguments = arguments_parser(__doc__).parse_args()
    lines = list(evaluation_lines(arguments.run / "run.log"))
    if not lines:
        raise SystemExit(f"error: {arguments.run / 'run.log'}: no evaluation found")
    OUTPUT.write_text(draw(lines, compare(arguments.run, arguments.start, arguments.pairs)), encoding="utf-8")


if __name__ == "__main__":
    main()
