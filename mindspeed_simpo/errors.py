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
    """Training cannot go on: a non-finite loss, a lost rank."""
