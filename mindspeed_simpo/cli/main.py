"""The program: its command line, exit codes and error messages.

torch and megatron-core are imported only after the configuration and the parallel layout have been validated, so that
a wrong command line fails within a second.
"""

from __future__ import annotations

import functools
import operator
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import tyro

from mindspeed_simpo.cli import launch
from mindspeed_simpo.cli.commands import COMMANDS
from mindspeed_simpo.errors import SimpoError, let_first_rank_print


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
        command = parse(argv, console_outputs=rank == 0)
        [declared] = [declared for declared in COMMANDS if declared.name == type(command).__name__]
        return declared.run(command, argv)
    finally:
        sys.stdout.flush()  # raises BrokenPipeError here, where it is handled, and not at interpreter exit


def parse(argv: Sequence[str], *, console_outputs: bool = True) -> Any:
    """The arguments of one command line, an instance of the command's type.

    Args:
        argv: Words of the command line, without the program's name.
        console_outputs: Whether to print help and errors.

    Raises:
        SystemExit: after the help, or for a wrong command line.
    """
    types = tuple(command.parsed_type(called=command.name in argv[:1]) for command in COMMANDS)
    return tyro.cli(
        functools.reduce(operator.or_, types),
        prog="mindspeed-simpo",
        description="Preference training with SimPO, DPO and their kin on megatron-core.",
        args=list(argv),
        console_outputs=console_outputs,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
    )


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
