"""Why an example cannot be used, and how a message shows what was found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

ProblemKind = Literal["malformed", "empty", "identical", "not_prefix", "too_long", "unreadable", "tie", "unpaired"]
NO_FAULT: tuple[ProblemKind, ...] = ("tie", "unpaired")
"""Kinds of examples that are sound and make no pair: they are counted and left out whatever the options say."""


class ExampleError(Exception):
    """Why one example cannot be used; becomes an entry of the data report, never a traceback."""

    def __init__(self, kind: ProblemKind, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = printable(message)

    def __str__(self) -> str:
        return self.message


def malformed(message: str) -> ExampleError:
    """An :class:`ExampleError` of the most common kind."""
    return ExampleError("malformed", message)


def found(value: Any) -> str:
    """Name a value for a message, briefly."""
    if value is None or isinstance(value, bool):
        return str(json.dumps(value))
    if isinstance(value, int | float):
        return f"the number {str(value)[:20]}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, Mapping):
        return f"an object with the keys {quoted(value) or '(none)'}"
    if isinstance(value, Sequence):
        return f"a list of {len(value)}"
    return f"a value of type {type(value).__name__}"


def quoted(names: Any) -> str:
    """``a, b`` in backticks, at most a dozen."""
    names = [f"`{printable(str(name)[:40])}`" for name in names]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def printable(text: str) -> str:
    """``text`` on one line, with what cannot be shown or stored (control characters, lone surrogates) escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, or the error's type where its message is empty."""
    lines = str(error).strip().splitlines()
    return printable(lines[0][:300]) if lines else type(error).__name__


def as_text(value: Any, where: str) -> str:
    """``value`` if it is text that UTF-8 can hold.

    Raises:
        ExampleError: for any other type, and for lone surrogates.
    """
    if not isinstance(value, str):
        raise malformed(f"{where}: expected text, found {found(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise malformed(f"{where}: the character {value[error.start]!r} is half of a pair, not text") from None
    return value
