"""Errors that a user can act on. Any other exception that leaves this package is a bug of the package."""

from __future__ import annotations

import time

_PEER_GRACE_S = 2.0


class SimpoError(Exception):
    """Base class: the message says what was found, where, what was expected and what to do.

    The command line prints the message without a traceback and exits with ``exit_code``.
    """

    exit_code = 1
    everywhere = False
    """Whether every rank raises this same error, so that only rank 0 has to print the message."""


class ConfigError(SimpoError):
    """The configuration or a command-line flag is not valid; exit code 2."""

    exit_code = 2


class DataError(SimpoError):
    """A preference-data file or an example in a file cannot be used."""


class ModelError(SimpoError):
    """A Hugging Face checkpoint or tokenizer cannot be used."""


class CheckpointError(SimpoError):
    """A training checkpoint is absent, incomplete, damaged or of another model."""


class TrainingError(SimpoError):
    """Training cannot go on: a loss or gradient that is not finite, metrics that cannot be written."""


class PeerLostError(SimpoError):
    """Another rank ended or hangs. By the exit code the launcher recognises that this rank is not the cause."""

    exit_code = 70
    timeout_exit_code = 71
    """The exit code where a collective timed out: the other rank hangs, and the launcher has to kill that rank."""

    def __init__(self, message: str, *, timed_out: bool) -> None:
        super().__init__(message)
        if timed_out:
            self.exit_code = self.timeout_exit_code


def let_first_rank_print(rank: int) -> None:
    """Wait, on every other rank than 0, before a rank prints an error or ends because of it.

    A launcher ends all ranks when one has ended. The wait keeps it from ending rank 0 before that has printed the same
    error, and where rank 0 fails too, this process is ended before it prints the error again.
    """
    if rank:
        time.sleep(_PEER_GRACE_S)
