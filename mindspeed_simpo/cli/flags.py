"""Command-line flags from the option fields of ``config``: names, help texts and defaults; ``Config`` checks values."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import Annotated, Any, get_args, get_origin

import tyro
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mindspeed_simpo.config.options import OPTION_GROUPS, DataSource, takes_bool
from mindspeed_simpo.config.ranges import describe_range

_METAVARS = {int: "INT", float: "FLOAT", str: "STR"}


def option_fields() -> list[tuple[str, Any, Any]]:
    """One ``(name, type, default)`` field for ``dataclasses.make_dataclass`` per option group.

    The type of each field is a dataclass of optional flags, in which None means that the flag was not given.
    """
    fields = []
    for group in OPTION_GROUPS:
        title = (group.__doc__ or group.__name__).rstrip(".")
        options = dataclasses.make_dataclass(
            group.__name__, [_flag(name, field) for name, field in group.model_fields.items()], frozen=True
        )
        marked = Annotated[options, tyro.conf.arg(name=title, help="")]  # type: ignore[valid-type]
        fields.append((group.__name__, marked, dataclasses.field(default_factory=options)))
    return fields


def own_fields(options: type[BaseModel]) -> list[tuple[str, Any, Any]]:
    """The same fields for the options of one command alone, which are no keys of a configuration."""
    return [_flag(name, field, "required") for name, field in options.model_fields.items()]


def given(command: Any) -> dict[str, Any]:
    """The keys that the command line sets, with values that ``Config`` converts and checks."""
    values: dict[str, Any] = {}
    for group in OPTION_GROUPS:
        values |= own_given(getattr(command, group.__name__), group)
    return values


def own_given(flags: Any, options: type[BaseModel]) -> dict[str, Any]:
    """The options that flags set, with values that the options convert and check."""
    values = {name: getattr(flags, name) for name in options.model_fields}
    return {name: _plain(value) for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        items = [_plain(item) for item in value]
        return items[0] if len(items) == 1 else items
    if isinstance(value, str) and value.startswith("{"):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def _flag(name: str, field: FieldInfo, required: str = "required, here or in CONFIG") -> tuple[str, Any, Any]:
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)] or [field.annotation]
    metavar: str | None = None
    flag_type: Any = str
    if takes_bool(field):
        flag_type = bool
    elif any(get_origin(kind) is dict for kind in kinds):
        metavar = "JSON"
    elif any(get_origin(kind) is list for kind in kinds):
        flag_type, item = list[str], "PATH|JSON" if DataSource in kinds else "NAME"
        metavar = f"{item} [{item} ...]"
    else:
        literals = [value for kind in kinds for value in get_args(kind) or ([kind] if isinstance(kind, str) else [])]
        metavar = "{" + ",".join(literals) + "}" if literals else _METAVARS[kinds[0]]
    behaviour = [describe_range(field)]
    if field.is_required():
        behaviour.append(required)
    elif field.default not in (None, []):
        behaviour.append(f"default: {field.default}")
    hint = "; ".join(part for part in behaviour if part)
    argument = tyro.conf.arg(
        help=field.description, metavar=metavar, help_behavior_hint=f"({hint})" if hint else "", prefix_name=False
    )
    return name, Annotated[flag_type | None, argument], dataclasses.field(default=None)
