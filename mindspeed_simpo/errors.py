"""Errors that a user can act on; everything else that escapes is a bug of this package."""

from __future__ import annotations


class SimpoError(Exception):
    """What went wrong, where, what was expected and what to do; shown without a traceback, exit code 1."""

    exit_code = 1
    everywhere = False
    """Whether every rank raises this same error, so that one of them may speak for all."""


class ConfigError(SimpoError):
    """The configuration or a command-line flag is not valid; exit code 2."""

    exit_code = 2


class DataError(SimpoError):
    """A preference-data file or row cannot be used."""


class ModelError(SimpoError):
    """A Hugging Face checkpoint or tokenizer cannot be used."""


class CheckpointError(SimpoError):
    """A training checkpoint is absent, half-written, damaged or of another model."""


class TrainingError(SimpoError):
    """Training cannot go on: a loss or gradient that is not finite, metrics that cannot be written."""


class PeerLostError(SimpoError):
    """Another rank died or hangs; the launcher tells by the exit code that this rank is not the cause."""

    exit_code = 70
    exit_code_of_silence = 71
    """Where the other rank was waited for in vain: the launcher itself then has to kill it."""

    def __init__(self, message: str, *, waited: bool) -> None:
        super().__init__(message)
        if waited:
            self.exit_code = self.exit_code_of_silence
