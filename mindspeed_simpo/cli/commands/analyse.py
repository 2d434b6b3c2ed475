"""``analyse``: numbers and figures of a run's rewards and likelihoods."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from mindspeed_simpo.cli import launch
from mindspeed_simpo.cli.command import Command, is_first_rank, open_device, resolve, without_nproc
from mindspeed_simpo.errors import ConfigError


def _analyse(command: Any, argv: Sequence[str]) -> int:
    _check(command)
    config, nproc = resolve(command)
    if nproc > 1:
        return launch.launch(nproc, without_nproc(argv))
    device = open_device(config)
    from mindspeed_simpo.studies.analysis.run import Request, analyse

    request = Request(command.against, command.output, command.part, command.max_pairs, command.shown_pairs)
    folder = analyse(config, device, request)
    if is_first_rank():
        sys.stdout.write(f"{folder / 'index.html'}\n")
        sys.stdout.flush()
    return 0


def _check(command: Any) -> None:
    if importlib.util.find_spec("plotly") is None:
        raise _everywhere("plotly is not installed: pip install 'mindspeed-simpo[studies]'")
    if command.part not in ("train", "eval"):
        raise _everywhere(f"--part: expected train or eval, found {command.part!r}")
    if command.max_pairs is not None and command.max_pairs < 1:
        raise _everywhere(f"--max-pairs: expected a number of at least 1, found {command.max_pairs}")
    if command.shown_pairs < 0:
        raise _everywhere(f"--shown-pairs: expected a number of at least 0, found {command.shown_pairs}")


def _everywhere(message: str) -> ConfigError:
    error = ConfigError(message)
    error.everywhere = True
    return error


_AGAINST = Annotated[
    str | None,
    tyro.conf.arg(
        help="Second model, scored on the same pairs and shown beside the first: output folder or checkpoint of "
        "another run, which is scored by its own objective; a Hugging Face folder; or `base`, the weights that "
        "training starts from.",
        metavar="BASE",
    ),
]
_OUTPUT = Annotated[
    str | None,
    tyro.conf.arg(
        help="Folder to write.", metavar="DIR", help_behavior_hint="(default: analysis/ in the run's folder)"
    ),
]
_PART = Annotated[str, tyro.conf.arg(help="Part of the data to score.", metavar="{train,eval}")]
_MAX_PAIRS = Annotated[
    int | None,
    tyro.conf.arg(
        help="Score so many pairs, evenly spaced over the data set.", metavar="N", help_behavior_hint="(default: all)"
    ),
]
_SHOWN = Annotated[int, tyro.conf.arg(help="Hardest, and most confident, pairs to show with their text.", metavar="N")]

COMMAND = Command(
    "analyse",
    "Score pairs with the weights of --load and write numbers and a page of figures to its analysis folder.",
    _analyse,
    arguments=(
        ("against", _AGAINST, dataclasses.field(default=None)),
        ("output", _OUTPUT, dataclasses.field(default=None)),
        ("part", _PART, dataclasses.field(default="eval")),
        ("max_pairs", _MAX_PAIRS, dataclasses.field(default=None)),
        ("shown_pairs", _SHOWN, dataclasses.field(default=10)),
    ),
    configured=True,
    on_ranks=True,
)
