"""``plan``: the layouts for a cluster, ranked by the simulated time of a step."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mindspeed_simpo.cli import flags
from mindspeed_simpo.cli.command import Command
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.file import load_config, validate
from mindspeed_simpo.errors import ConfigError

if TYPE_CHECKING:
    from mindspeed_simpo.model.description import ModelDescription
    from mindspeed_simpo.studies.plan.run_lengths import RunLengths

_NO_DATA = "assumed lengths"
"""``data_path`` of a plan without data."""
_ASSUMED_PAIRS = 4096
"""Pairs that are drawn where lengths are assumed, but at least a global batch."""


def _plan(command: Any, _argv: Sequence[str]) -> int:
    devices = _number("--devices", command.devices)
    shown = _number("--top", command.top)
    lengths = _lengths(command.lengths)
    config = _config(command, assumed=lengths is not None)
    from rich.console import Console

    from mindspeed_simpo.model.hf_config import read_description
    from mindspeed_simpo.studies.plan import report
    from mindspeed_simpo.studies.plan.devices import find_kind
    from mindspeed_simpo.studies.plan.layouts import Space
    from mindspeed_simpo.studies.plan.rank import search
    from mindspeed_simpo.studies.plan.simulation import Simulator

    kind = find_kind(command.device_kind, command.device_file)
    model = read_description(config.model_name_or_path)
    config = config.model_copy(update={"device": kind.device})
    run = _run_lengths(config, model, lengths)
    space = Space(config, model, devices, kind.device, _fixed(command))
    plan = search(space, Simulator(model, kind, run), shown)
    if not plan.ranked:
        raise ConfigError(_nothing(plan, devices, kind.name))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    report.print_plan(console, plan, kind, devices, run.source)
    if command.output is not None:
        Path(command.output).write_text(report.as_json(plan, kind, devices, run.source), encoding="utf-8")
    if command.write is not None:
        given = config.model_dump(exclude_unset=True, exclude={"device"})
        given = {name: value for name, value in given.items() if (name, value) != ("data_path", _NO_DATA)}
        Path(command.write).write_text(report.as_yaml(plan, given, kind, devices), encoding="utf-8")
    return 0


def _config(command: Any, *, assumed: bool) -> Config:
    """The configuration of a YAML file, or the defaults for a model's folder or its ``config.json``."""
    path, given = Path(command.config), flags.given(command)
    if assumed:
        given = {"data_path": _NO_DATA} | given
    if path.name == "config.json" or (path / "config.json").is_file():
        folder = path if path.is_dir() else path.parent
        config = validate({"model_name_or_path": str(folder), **given}, str(path), given)
    else:
        config = load_config(command.config, given)
    if config.backend != "megatron":
        raise ConfigError(f"{path}: plan simulates backend: megatron, found backend: {config.backend}")
    return config


def _fixed(command: Any) -> frozenset[str]:
    """Keys that the command line gives, which stay as given."""
    from mindspeed_simpo.studies.plan.layouts import RECOMPUTE, SEARCHED

    found = set(flags.given(command)) & set(SEARCHED)
    together = set(RECOMPUTE[0])
    return frozenset(found | together if found & together else found)


def _run_lengths(config: Config, model: ModelDescription, lengths: tuple[int, int, int] | None) -> RunLengths:
    from mindspeed_simpo.data.dataset import prepare_pairs
    from mindspeed_simpo.data.tokenizer import load_tokenizer
    from mindspeed_simpo.studies.plan.run_lengths import RunLengths, assumed_lengths

    windows = tuple(dict.fromkeys(layer.attention.window for layer in model.first_of_kind))
    if lengths is not None:
        drawn = assumed_lengths(*lengths, config.seq_length, max(_ASSUMED_PAIRS, config.global_batch_size))
        mean = " + ".join(f"{value:.0f}" for value in drawn.mean(axis=0))
        return RunLengths(drawn, windows, f"assumed pairs of {mean} tokens on average, log-normal")
    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template)
    pairs_of_run = prepare_pairs(
        config, tokenizer, "train", progress=sys.stderr.isatty(), vocab_size=model.vocab_size, images=None
    )
    mean = " + ".join(f"{value:.0f}" for value in pairs_of_run.lengths.mean(axis=0))
    return RunLengths(
        pairs_of_run.lengths, windows, f"the run's own {len(pairs_of_run)} pairs of {mean} tokens on average"
    )


def _nothing(plan: Any, devices: int, name: str) -> str:
    if not plan.refused:
        return (
            f"no layout of {devices} devices is allowed: devices, global_batch_size and the sizes of the model have no "
            "common divisors; `check` says which numbers do not divide"
        )
    from mindspeed_simpo.studies.plan.report import describe

    least = min((each.refused for each in plan.refused), key=lambda each: each.memory_bytes)
    return (
        f"none of {len(plan.refused)} layouts fits on {devices} x {name}: the smallest, {describe(least.candidate)}, "
        f"needs {least.memory_bytes / 2**30:.3g} GiB of each device: use more devices, adapters (lora_r), a shorter "
        "seq_length or a smaller max_tokens_per_micro_batch"
    )


def _number(flag: str, text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise ConfigError(f"{flag}: expected a whole number of at least 1, found {text!r}")
    return number


def _lengths(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--lengths: expected PROMPT,CHOSEN,REJECTED in tokens, such as 512,256,256, found {text!r}")
    prompt, chosen, rejected = map(int, parts)
    return prompt, chosen, rejected


def _argument(help_text: str, metavar: str) -> Any:
    return tyro.conf.arg(help=help_text, metavar=metavar)


COMMAND = Command(
    "plan",
    "Rank the parallel layouts of CONFIG, or of a model's folder, for a cluster by the simulated time of a step; a key "
    "given as a flag stays as given.",
    _plan,
    arguments=(
        ("devices", Annotated[str, _argument("Number of devices.", "N")]),
        (
            "device_kind",
            Annotated[
                str | None, _argument("910B-64GB, 910B-32GB, A3, H100, H200, or cpu: this host, measured.", "NAME")
            ],
            dataclasses.field(default=None),
        ),
        (
            "device_file",
            Annotated[str | None, _argument("JSON file of a device's rates, instead of --device-kind.", "FILE")],
            dataclasses.field(default=None),
        ),
        (
            "lengths",
            Annotated[
                str | None,
                _argument(
                    "Mean tokens of prompt, chosen and rejected response, such as 512,256,256, where there is no data.",
                    "P,C,R",
                ),
            ],
            dataclasses.field(default=None),
        ),
        ("top", Annotated[str, _argument("Number of layouts to show.", "N")], dataclasses.field(default="10")),
        (
            "output",
            Annotated[str | None, _argument("JSON file to write, with every layout.", "FILE")],
            dataclasses.field(default=None),
        ),
        (
            "write",
            Annotated[str | None, _argument("YAML file to write: CONFIG with the winner's keys.", "FILE")],
            dataclasses.field(default=None),
        ),
    ),
    configured=True,
)
