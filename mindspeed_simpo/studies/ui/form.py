"""The form of all options: one field for each, made from the options themselves, and its way to a configuration."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_origin

import yaml
from pydantic.fields import FieldInfo

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.describe import choices, describe_default, describe_values, kinds
from mindspeed_simpo.config.file import require_training_data, validate
from mindspeed_simpo.config.options import OPTION_GROUPS, takes_bool
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.objectives import OBJECTIVES

FORM = "the form"
"""What error messages name as the place of a key."""

Kind = Literal["switch", "choice", "text", "lines", "mapping"]


@dataclass(frozen=True)
class Field:
    """One option as a field of the form. An empty field leaves the option at its default."""

    name: str
    group: str
    stage: str | None
    """The only stage that the option belongs to; None for all stages."""
    kind: Kind
    """switch: true or false. choice: one of ``choices``, or empty where that is its initial state. text: a text or
    number. lines: one text a line. mapping: a JSON object."""
    choices: tuple[str, ...]
    default: str
    """In words; empty where the option has none."""
    hint: str
    """What the option means, in Markdown."""
    initial: bool | str
    """What the field holds before it is changed."""


@cache
def fields() -> tuple[Field, ...]:
    """The fields of all options, in the order of the groups."""
    stages = {key: stage for stage, objective in OBJECTIVES.items() for key in objective.keys.model_fields}
    return tuple(
        _field(name, option, (group.__doc__ or group.__name__).rstrip("."), stages.get(name))
        for group in OPTION_GROUPS
        for name, option in group.model_fields.items()
    )


def read(entries: Sequence[Any]) -> dict[str, Any]:
    """The values that a filled form gives: those of fields that differ from their initial state.

    Args:
        entries: What the fields hold, in the order of :func:`fields`.

    Raises:
        ConfigError: naming every field that cannot be read.
    """
    values, problems = {}, []
    for field, entry in zip(fields(), entries, strict=True):
        try:
            value = _read(field, entry)
        except ValueError as error:
            problems.append(f"{FORM}: `{field.name}`: {error}")
            continue
        if value is not None:
            values[field.name] = value
    if problems:
        raise ConfigError("\n".join(problems))
    return values


def entries_of(values: Mapping[str, Any]) -> list[Any]:
    """What the fields hold for a configuration's values, in the order of :func:`fields`."""
    return [_entry(field, values.get(field.name)) for field in fields()]


def validated(values: Mapping[str, Any], nproc: int) -> Config:
    """The configuration of the form's values, for ``nproc`` ranks.

    Raises:
        ConfigError: naming every wrong key, a missing training set, or the layout that does not fit the ranks.
    """
    config = validate(dict(values), where=FORM)
    require_training_data(config, FORM)
    make_layout(config, nproc)
    return config


def changed(config: Config) -> dict[str, Any]:
    """The keys of a configuration that were given and differ from their default, as plain values."""
    values = config.model_dump(mode="json", exclude_unset=True, exclude_defaults=True)
    return {field.name: values[field.name] for field in fields() if field.name in values}


def to_yaml(values: Mapping[str, Any]) -> str:
    """The YAML of a configuration file."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=100)


def command(values: Mapping[str, Any], source: str, base: Mapping[str, Any], nproc: int, verb: str = "train") -> str:
    """The command line that does what the form says.

    Args:
        values: Keys of the form that differ from their default.
        source: The configuration that the command names: a file or a recipe.
        base: Keys of that configuration that differ from their default; flags give the others.
        nproc: Ranks of this host.
        verb: The command.

    Raises:
        ConfigError: where the form takes back a key of ``source`` whose default no flag can give.
    """
    words = ["mindspeed-simpo", verb, source]
    for field in fields():
        before, now = base.get(field.name), values.get(field.name)
        if now is None and before is not None:
            now = Config.model_fields[field.name].default
            if now is None:
                raise ConfigError(f"no flag takes back `{field.name}` of {source}: save the form as a file of its own")
        if now != before:
            words += list(_flag(field.name, now))
    return shlex.join([*words, "--nproc-per-node", str(nproc)])


def _field(name: str, option: FieldInfo, group: str, stage: str | None) -> Field:
    found = list(kinds(option.annotation))
    default = describe_default(option)
    enumerated = choices(option)
    kind: Kind = "text"
    if takes_bool(option):
        kind, enumerated = ("switch", ()) if isinstance(option.default, bool) else ("choice", ("true", "false"))
    elif enumerated:
        kind = "choice"
    elif any(get_origin(part) is list for part in found):
        kind = "lines"
    elif any(part is dict or get_origin(part) is dict for part in found):
        kind = "mapping"
    lines = (
        "one a line"
        if all(part is str or get_origin(part) is list for part in found)
        else "one a line, mappings as JSON"
    )
    facts = {"lines": lines, "mapping": "as JSON", "text": describe_values(option)}.get(kind, "")
    facts = facts.removeprefix("text")
    if default and kind in ("lines", "mapping", "text"):
        facts = "; ".join(filter(None, [facts, default if option.is_required() else f"default: {default}"]))
    hint = f"{option.description} ({facts})" if facts else str(option.description)
    has_value = kind == "switch" or (kind == "choice" and isinstance(option.default, str))
    return Field(name, group, stage, kind, enumerated, default, hint, option.default if has_value else "")


def _read(field: Field, entry: Any) -> Any:
    if field.kind == "switch":
        if not isinstance(entry, bool):
            raise ValueError(f"expected true or false, found {entry!r}")
        return None if entry == field.initial else entry
    if entry is None:
        return None
    if not isinstance(entry, str):
        raise ValueError(f"expected a text, found {type(entry).__name__}")
    text = entry.strip()
    if not text or (field.kind == "choice" and text == field.initial):
        return None
    if field.kind == "mapping":
        return _json(text)
    if field.kind == "lines":
        items = [_json(line) if line.startswith("{") else line for line in map(str.strip, text.splitlines()) if line]
        return items[0] if len(items) == 1 else items
    return text


def _json(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'expected a JSON object such as {{"name": "value"}}: {error}') from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {text[:80]}")
    return value


def _entry(field: Field, value: Any) -> Any:
    if value is None:
        return field.initial
    if field.kind == "switch":
        return value if isinstance(value, bool) else field.initial
    if field.kind == "choice":
        text = _text(value)
        return text if text in field.choices else field.initial
    if field.kind == "lines":
        return "\n".join(_text(item) for item in (value if isinstance(value, list) else [value]))
    return _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)


def _flag(name: str, value: Any) -> Iterator[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        yield f"--{flag}" if value else f"--no-{flag}"
        return
    texts = [_text(item) for item in value] if isinstance(value, list) else [_text(value)]
    if len(texts) == 1:
        yield f"--{flag}={texts[0]}" if texts[0].startswith("-") else f"--{flag}"
        if texts[0].startswith("-"):
            return
    else:
        yield f"--{flag}"
    yield from texts
