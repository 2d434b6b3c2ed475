"""An option's values and default in words and signs, for documentation and forms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from mindspeed_simpo.config.ranges import describe_range

_NAMES = {bool: "`true`, `false`", int: "integer", float: "number", str: "text"}


def describe_values(field: FieldInfo) -> str:
    """The values that an option takes, in Markdown, such as ``number, >= 0, < 0.5``."""
    names = " or ".join(dict.fromkeys(_names(field.annotation)))
    bounds = describe_range(field)
    return f"{names}, {bounds}" if bounds else names


def describe_default(field: FieldInfo) -> str:
    """The default of an option as plain text; an empty text where it has none, ``required`` where it must be given."""
    if field.is_required():
        return "required"
    if field.default is None:
        return ""
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def kinds(annotation: Any) -> Iterator[Any]:
    """The types that an option's annotation unites: ``str``, ``list``, ``dict``, a ``Literal`` and so on; not None."""
    if get_origin(annotation) in (Literal, list, dict) or not get_args(annotation):
        if annotation is not type(None):
            yield annotation
    else:
        for part in get_args(annotation):
            yield from kinds(part)


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The texts that an option takes where its values are enumerated; else an empty tuple."""
    found = list(kinds(field.annotation))
    if not found or any(get_origin(kind) is not Literal for kind in found):
        return ()
    return tuple(str(value) for kind in found for value in get_args(kind))


def _names(annotation: Any) -> Iterator[str]:
    for kind in kinds(annotation):
        if get_origin(kind) is Literal:
            yield ", ".join(f"`{value}`" for value in get_args(kind))
        elif get_origin(kind) is list:
            yield "list of texts" if get_args(kind) == (str,) else "list of these"
        elif get_origin(kind) is dict:
            yield "mapping"
        else:
            yield _NAMES.get(kind, "mapping")
