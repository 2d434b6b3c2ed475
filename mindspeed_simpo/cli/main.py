"""``mindspeed-simpo train | evaluate | check | export | encode``: command line, exit codes and error messages.

torch and megatron-core are imported only after the configuration and the parallel layout have been validated, so that
a wrong command line fails within a second.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import tyro

from mindspeed_simpo.cli import flags, launch
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.file import load_config, require_training_data
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.errors import ConfigError, SimpoError, let_first_rank_print

if TYPE_CHECKING:
    from mindspeed_simpo.device import Device

_MAX_RANKS = 1024

_Config = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(help="YAML file of configuration keys, or the name of a recipe.", metavar="CONFIG"),
]
_Nproc = Annotated[
    str | None,
    tyro.conf.arg(
        help="Ranks (processes, one per device) to start on this host. For several hosts start the program with "
        "torchrun and leave this flag out.",
        metavar="N",
        help_behavior_hint=f"(>= 1, <= {_MAX_RANKS}; default: 1)",
    ),
]


@dataclasses.dataclass(frozen=True)
class _Export:
    checkpoint: Annotated[
        str, tyro.conf.arg(help="Checkpoint: a checkpoints folder or one iter_* folder.", metavar="DIR")
    ]
    output: Annotated[str, tyro.conf.arg(help="Hugging Face folder to write.", metavar="HF_DIR")]
    merge_adapters: Annotated[
        bool, tyro.conf.arg(help="Write whole weights with the adapters merged, not the adapters alone, for peft.")
    ] = False


@dataclasses.dataclass(frozen=True)
class _Recipes:
    """No arguments."""


def main() -> NoReturn:
    """Entry point: prepare signal handling, run :func:`execute` and exit with its code."""
    launch.prepare_process()
    if not launch.in_launched_rank():
        raise SystemExit(execute(sys.argv[1:]))
    try:
        code = execute(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # a rank that failed must not wait at exit for collectives that the others never join
    raise SystemExit(0)


def execute(argv: Sequence[str]) -> int:
    """Run one command line.

    Returns:
        The exit code: 0 for success, 1 for a failed command, 2 for a wrong command line or configuration, 130 after
        Ctrl-C, 141 where the reader of stdout closed the pipe. An error that the user can act on becomes one message on
        stderr; any other exception is a bug and propagates.
    """
    rank = int(os.environ["RANK"]) if launch.in_launched_rank() else 0
    try:
        return _run(argv, rank)
    except SimpoError as error:
        _print_error(str(error), rank, everywhere=error.everywhere)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout, such as `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # such as a full disk or a folder without write permission; the message names the path
        _print_error(str(error), rank, everywhere=False)
        return 1


def _run(argv: Sequence[str], rank: int) -> int:
    try:
        command = tyro.cli(
            _commands(),
            prog="mindspeed-simpo",
            description="Preference training with SimPO, DPO and their kin on megatron-core.",
            args=list(argv),
            console_outputs=rank == 0,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
        )
        return _RUNNERS[type(command).__name__](command, argv)
    finally:
        sys.stdout.flush()  # raises BrokenPipeError here, where it is handled, and not at interpreter exit


def _commands() -> Any:
    options = flags.option_fields()
    nproc = ("nproc_per_node", _Nproc, dataclasses.field(default=None))
    described = {
        "train": "Train with the configuration CONFIG; flags override its keys.",
        "evaluate": "Score the held-out pairs with the configured objective; the last line of stdout is a JSON object.",
        "check": "Check data, hyper-parameters, parallel layout and memory without training; exit code 1 on an error.",
    }
    part = Annotated[str, tyro.conf.arg(help="Part of the data to write.", metavar="{train,eval}")]
    prefix = Annotated[
        str, tyro.conf.arg(help="Path prefix of the files, the later --data-path of MindSpeed-LLM.", metavar="PREFIX")
    ]
    own: list[Any] = [("output_prefix", prefix), ("part", part, dataclasses.field(default="train"))]
    encode = dataclasses.make_dataclass("encode", [("config", _Config), *own, *options], frozen=True)
    union: Any = (
        Annotated[
            _Export,
            tyro.conf.subcommand("export", description="Write a training checkpoint as a Hugging Face folder."),
        ]
        | Annotated[
            encode,
            tyro.conf.subcommand("encode", description="Write the tokenised pairs in MindSpeed-LLM's indexed format."),
        ]
    )
    union = (
        union
        | Annotated[
            _Recipes, tyro.conf.subcommand("recipes", description="List the shipped recipes, whose names CONFIG takes.")
        ]
    )
    for name, description in reversed(described.items()):
        command = dataclasses.make_dataclass(name, [("config", _Config), nproc, *options], frozen=True)
        union = Annotated[command, tyro.conf.subcommand(name, description=description)] | union
    return union


def _train(command: Any, argv: Sequence[str]) -> int:
    config, nproc = _resolve(command)
    require_training_data(config, command.config)
    if nproc > 1:
        return launch.launch(nproc, _without_nproc(argv))
    device = _open_device(config)
    from mindspeed_simpo.training.trainer import train

    return train(config, device)


def _evaluate(command: Any, argv: Sequence[str]) -> int:
    config, nproc = _resolve(command)
    if nproc > 1:
        return launch.launch(nproc, _without_nproc(argv))
    device = _open_device(config)
    from mindspeed_simpo.training.evaluation import evaluate

    metrics = evaluate(config, device)
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(json.dumps(metrics) + "\n")
        sys.stdout.flush()
    return 0


def _check(command: Any, _argv: Sequence[str]) -> int:
    config, nproc = _resolve(command)
    require_training_data(config, command.config)
    from mindspeed_simpo.cli.check import check

    return 0 if check(config, _world_size(nproc)) else 1


def _export(command: _Export, _argv: Sequence[str]) -> int:
    from mindspeed_simpo.device import open_device

    open_device("cpu")
    from mindspeed_simpo.training.session import export_checkpoint

    export_checkpoint(command.checkpoint, Path(command.output), merge_adapters=command.merge_adapters)
    return 0


def _encode(command: Any, _argv: Sequence[str]) -> int:
    if command.part not in ("train", "eval"):
        raise ConfigError(f"--part: expected train or eval, found {command.part!r}")
    config = load_config(command.config, flags.given(command))
    from mindspeed_simpo.data.dataset import prepare_pairs
    from mindspeed_simpo.data.indexed import write_indexed_pairs
    from mindspeed_simpo.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template)
    pairs = prepare_pairs(config, tokenizer, command.part, progress=sys.stderr.isatty())
    written = write_indexed_pairs(command.output_prefix, (pairs[index] for index in range(len(pairs))))
    sys.stdout.write(f"{written} pairs: --data-path {command.output_prefix}\n")
    return 0


def _recipes(_command: Any, _argv: Sequence[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from mindspeed_simpo.config.recipes import recipes

    table = Table("recipe", "what it trains", "what to expect")
    for recipe in recipes():
        table.add_row(recipe.name, recipe.title, recipe.expect)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


_RUNNERS: dict[str, Callable[[Any, Sequence[str]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "check": _check,
    "_Export": _export,
    "_Recipes": _recipes,
    "encode": _encode,
}


def _resolve(command: Any) -> tuple[Config, int]:
    """The validated configuration and the number of ranks to start on this host (1 under a launcher).

    Raises:
        ConfigError: where a key or flag is wrong, or the layout does not fit the number of ranks.
    """
    try:
        nproc = _parse_nproc(command.nproc_per_node)
        config = load_config(command.config, flags.given(command))
        make_layout(config, _world_size(nproc))
    except ConfigError as error:
        error.everywhere = True
        raise
    return config, nproc


def _open_device(config: Config) -> Device:
    """Open the device. No module may import megatron earlier, because the CPU and NPU adaptors patch megatron."""
    from mindspeed_simpo.device import open_device

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return open_device(config.device, local_rank, config.distributed_timeout_minutes)


def _parse_nproc(text: str | None) -> int:
    if text is None:
        return 1
    try:
        nproc = int(text)
    except ValueError:
        nproc = 0
    if not 1 <= nproc <= _MAX_RANKS:
        raise ConfigError(f"--nproc-per-node: expected a whole number from 1 to {_MAX_RANKS}, found {text!r}")
    if launch.in_launched_rank():
        raise ConfigError(
            f"--nproc-per-node: a launcher started this process already (RANK and "
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} are set, as torchrun does); leave the flag out"
        )
    return nproc


def _world_size(nproc: int) -> int:
    return int(os.environ["WORLD_SIZE"]) if launch.in_launched_rank() else nproc


def _without_nproc(argv: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word.replace("_", "-").split("=")[0] == "--nproc-per-node":
            skip = "=" not in word
        else:
            kept.append(word)
    return kept


def _print_error(message: str, rank: int, *, everywhere: bool) -> None:
    """Print an error to stderr once per run.

    Where all ranks have the same error (``everywhere``), rank 0 alone prints; see also ``let_first_rank_print``.
    """
    let_first_rank_print(rank)
    if rank and everywhere:
        return
    prefix = f"rank {rank}: " if rank else ""
    sys.stderr.write("".join(f"error: {prefix}{line}\n" for line in message.splitlines()))
    sys.stderr.flush()
