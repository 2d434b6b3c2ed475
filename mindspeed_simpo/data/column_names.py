"""The names of the columns of examples: the defaults, and those of ``map_keys``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mindspeed_simpo.data import layouts
from mindspeed_simpo.data.problems import found
from mindspeed_simpo.data.turns import Tags
from mindspeed_simpo.errors import ConfigError

_DEFAULT_COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "instruction"),
    "query": ("input",),
    "response": ("output",),
    "history": ("history",),
    "messages": ("conversations",),
    "system": ("system",),
    "tools": ("tools",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "images": ("images", "image"),
    "label": (),
    "score": (),
}


@dataclass(frozen=True)
class ColumnNames:
    """What ``map_keys`` says, checked."""

    columns: Mapping[str, tuple[str, ...]]
    """Canonical name -> columns, of which an example has at most one."""
    tags: Tags
    required: Mapping[str, str]
    """Canonical name -> column that every example must have: named by ``map_keys`` and no default, as a typo is."""
    mapped: frozenset[str]
    """Canonical names that ``map_keys`` names."""
    label: str | None
    """The label column to follow; an empty text for none, None for the layout's own."""
    score: str | None

    @classmethod
    def of(cls, map_keys: Mapping[str, str | dict[str, str]] | None) -> ColumnNames:
        """The names by ``map_keys``; the defaults for None.

        Raises:
            ConfigError: for an unknown canonical name or tag.
        """
        columns, tags, required = dict(_DEFAULT_COLUMNS), Tags(), {}
        for name, column in (map_keys or {}).items():
            if name == "tags":
                tags = _tags(column)
            elif name not in columns:
                raise ConfigError(f"map_keys: unknown name `{name}`; {_nearest(name, [*columns, 'tags'])}")
            elif not isinstance(column, str):
                raise ConfigError(f"map_keys: `{name}` must be the name of one column, found {found(column)}")
            else:
                if column and column not in columns[name] and name not in ("label", "score"):
                    required[name] = column
                columns[name] = (column,) if column else ()
        mapped = frozenset(map_keys or {})
        label = columns["label"][0] if columns["label"] else ("" if "label" in mapped else None)
        if label and label not in layouts.LABELS:
            raise ConfigError(f"map_keys: `label` must be one of {', '.join(layouts.LABELS)}, found {label}")
        return cls(columns, tags, required, mapped, label, columns["score"][0] if columns["score"] else None)


def _tags(value: Any) -> Tags:
    known = [tag.name for tag in fields(Tags)]
    if not isinstance(value, Mapping):
        raise ConfigError(f"map_keys: `tags` must be an object with keys of {', '.join(known)}, found {found(value)}")
    for name in value:
        if name not in known:
            raise ConfigError(f"map_keys.tags: unknown name `{name}`; {_nearest(name, known)}")
    return Tags(**value)


def _nearest(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean `{nearest[0]}`?" if nearest else f"expected one of {', '.join(known)}"
