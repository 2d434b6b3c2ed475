"""What a command of the program is, and what its runner asks for: configuration, number of ranks, device."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mindspeed_simpo.cli import flags, launch
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.file import load_config
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.errors import ConfigError

if TYPE_CHECKING:
    from mindspeed_simpo.device import Device

_MAX_RANKS = 1024

_CONFIG = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(help="YAML file of configuration keys, or the name of a recipe.", metavar="CONFIG"),
]
_NPROC = Annotated[
    str | None,
    tyro.conf.arg(
        help="Ranks (processes, one per device) to start on this host. For several hosts start the program with "
        "torchrun and leave this flag out.",
        metavar="N",
        help_behavior_hint=f"(>= 1, <= {_MAX_RANKS}; default: 1)",
    ),
]


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: what its help says, its arguments, and the function that runs it.

    A module of ``cli.commands`` declares it, and imports what is heavy inside of ``run``.
    """

    name: str
    description: str
    run: Callable[[Any, Sequence[str]], int]
    """Takes the parsed arguments and the words of the command line; returns the exit code."""
    arguments: Sequence[tuple[Any, ...]] = ()
    """The command's own arguments: ``(name, type)`` or ``(name, type, dataclasses.field(default=...))``, those without
    a default first."""
    configured: bool = False
    """Whether the command takes CONFIG and a flag for each of its keys."""
    on_ranks: bool = False
    """Whether the command takes ``--nproc-per-node``."""

    def parsed_type(self, *, called: bool) -> Any:
        """The type of ``run``'s first argument, annotated for tyro; without fields for a command that is not called."""
        fields = self._fields() if called else []
        parsed = dataclasses.make_dataclass(self.name, fields, frozen=True)
        return Annotated[parsed, tyro.conf.subcommand(self.name, description=self.description)]

    def _fields(self) -> list[tuple[Any, ...]]:
        fields = [*self.arguments]
        if self.configured:
            fields = [("config", _CONFIG), *fields]
        if self.on_ranks:
            fields.append(("nproc_per_node", _NPROC, dataclasses.field(default=None)))
        return [*fields, *flags.option_fields()] if self.configured else fields


def resolve(command: Any) -> tuple[Config, int]:
    """The validated configuration and the number of ranks to start on this host (1 under a launcher).

    Raises:
        ConfigError: where a key or flag is wrong, or the layout does not fit the number of ranks.
    """
    try:
        nproc = parse_nproc(command.nproc_per_node)
        config = load_config(command.config, flags.given(command))
        make_layout(config, world_size(nproc))
    except ConfigError as error:
        error.everywhere = True
        raise
    return config, nproc


def open_device(config: Config) -> Device:
    """Open the device. No module may import megatron earlier, because the CPU and NPU adaptors patch megatron."""
    from mindspeed_simpo.device import open_device as open_named

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    # FSDP2 and the ranks of the distributed optimizer alone overlap better with several queues
    one_queue = (
        config.backend == "megatron" and max(config.tensor_model_parallel_size, config.context_parallel_size) > 1
    )
    return open_named(config.device, local_rank, config.distributed_timeout_minutes, one_queue=one_queue)


def world_size(nproc: int) -> int:
    """Ranks of the run: those of the launcher where there is one, else ``nproc``."""
    return int(os.environ["WORLD_SIZE"]) if launch.in_launched_rank() else nproc


def is_first_rank() -> bool:
    """Whether this process prints what the command gives."""
    return os.environ.get("RANK", "0") == "0"


def without_nproc(argv: Sequence[str]) -> list[str]:
    """The command line of each rank."""
    kept, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word.replace("_", "-").split("=")[0] == "--nproc-per-node":
            skip = "=" not in word
        else:
            kept.append(word)
    return kept


def parse_nproc(text: str | None) -> int:
    """The value of ``--nproc-per-node``, 1 where it is not given.

    Raises:
        ConfigError: where it is no such number, or a launcher started this process.
    """
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
