"""``export`` and ``encode``: checkpoints and data in other projects' formats."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from mindspeed_simpo.cli import flags
from mindspeed_simpo.cli.command import Command
from mindspeed_simpo.config.file import load_config
from mindspeed_simpo.errors import ConfigError


def _export(command: Any, _argv: Sequence[str]) -> int:
    from mindspeed_simpo.device import open_device

    open_device("cpu")
    from mindspeed_simpo.training.session import export_checkpoint

    export_checkpoint(command.checkpoint, Path(command.output), merge_adapters=command.merge_adapters)
    return 0


def _encode(command: Any, _argv: Sequence[str]) -> int:
    if command.part not in ("train", "eval"):
        raise ConfigError(f"--part: expected train or eval, found {command.part!r}")
    config = load_config(command.config, flags.given(command))
    from mindspeed_simpo.data.dataset import prepare_pairs, shared_prompts
    from mindspeed_simpo.data.indexed import write_indexed_pairs
    from mindspeed_simpo.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template)
    pairs = prepare_pairs(config, tokenizer, command.part, progress=sys.stderr.isatty())
    if command.part == "eval" and config.eval_decontaminate:
        training = prepare_pairs(config, tokenizer, "train", progress=sys.stderr.isatty())
        pairs = pairs.without_prompts(shared_prompts(pairs, training))
    written = write_indexed_pairs(command.output_prefix, (pairs[index] for index in range(len(pairs))))
    sys.stdout.write(f"{written} pairs: --data-path {command.output_prefix}\n")
    return 0


_CHECKPOINT = Annotated[
    str, tyro.conf.arg(help="Checkpoint: a checkpoints folder or one iter_* folder.", metavar="DIR")
]
_OUTPUT = Annotated[str, tyro.conf.arg(help="Hugging Face folder to write.", metavar="HF_DIR")]
_MERGE = Annotated[
    bool, tyro.conf.arg(help="Write whole weights with the adapters merged, not the adapters alone, for peft.")
]
_PREFIX = Annotated[
    str, tyro.conf.arg(help="Path prefix of the files, the later --data-path of MindSpeed-LLM.", metavar="PREFIX")
]
_PART = Annotated[str, tyro.conf.arg(help="Part of the data to write.", metavar="{train,eval}")]

COMMANDS = (
    Command(
        "export",
        "Write a training checkpoint as a Hugging Face folder.",
        _export,
        arguments=(
            ("checkpoint", _CHECKPOINT),
            ("output", _OUTPUT),
            ("merge_adapters", _MERGE, dataclasses.field(default=False)),
        ),
    ),
    Command(
        "encode",
        "Write the tokenised pairs in MindSpeed-LLM's indexed format.",
        _encode,
        arguments=(("output_prefix", _PREFIX), ("part", _PART, dataclasses.field(default="train"))),
        configured=True,
    ),
)
