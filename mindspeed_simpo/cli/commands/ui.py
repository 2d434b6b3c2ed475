"""``ui``: the page in a browser."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from mindspeed_simpo.cli.command import Command


def _ui(command: Any, _argv: Sequence[str]) -> int:
    from mindspeed_simpo.studies.ui.server import serve

    serve(command.root, command.port, show=command.open)
    return 0


_ROOT = Annotated[
    str,
    tyro.conf.arg(
        help="Folder that the page stays in: models, data, configurations and outputs lie in it.", metavar="FOLDER"
    ),
]
_PORT = Annotated[int, tyro.conf.arg(help="Port on 127.0.0.1; 0 takes a free one.", metavar="INT")]
_OPEN = Annotated[bool, tyro.conf.arg(help="Open the page in the default browser.")]

COMMAND = Command(
    "ui",
    "Serve a page on 127.0.0.1: a form of all options, check, start and stop of runs, curves, answers.",
    _ui,
    arguments=(
        ("root", _ROOT, dataclasses.field(default=".")),
        ("port", _PORT, dataclasses.field(default=7860)),
        ("open", _OPEN, dataclasses.field(default=False)),
    ),
)
