"""What a sweep varies: values of keys, ranges of keys and named points, from flags and from a YAML file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.file import read_mapping, unknown_key
from mindspeed_simpo.config.options import effect_of, takes_bool
from mindspeed_simpo.errors import ConfigError

POINT = "point"
"""Name of the parameter that stands for the named points."""
_SECTIONS = ("points", "grid", "search")
_HELD_OUT = ("eval_data_path", "split")


@dataclass(frozen=True)
class Range:
    """Values from ``low`` to ``high``, both included."""

    low: float
    high: float
    log: bool
    """Whether the logarithm of the value is drawn uniformly, not the value."""
    whole: bool
    """Whether the values are whole numbers."""


@dataclass(frozen=True)
class Space:
    """What a sweep varies; every key stands in one part only."""

    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Key -> its values."""
    search: Mapping[str, Range] = field(default_factory=dict)
    """Key -> its range."""
    points: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name -> keys with the values that they have together."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Key -> where the sweep names it, for messages."""

    @property
    def keys(self) -> list[str]:
        """All keys that differ between trials."""
        return list(self.origins)

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters of a trial: :data:`POINT` where there are named points, then the other keys."""
        return [POINT] * bool(self.points) + [*self.grid, *self.search]


def read_space(grid: Sequence[str], search: Sequence[str], file: Path | None, stage: str) -> Space:
    """Read flags and file.

    Args:
        grid: Texts ``KEY=VALUE,VALUE``; values are written as in YAML.
        search: Texts ``KEY=LOW:HIGH`` or ``KEY=LOW:HIGH:log``.
        file: YAML with the sections ``points``, ``grid`` and ``search``.
        stage: The configured objective, for hints.

    Raises:
        ConfigError: naming the flag or the file's entry that is wrong.
    """
    reader = _Reader(stage)
    if file is not None:
        reader.file(file)
    for text in grid:
        key, values = _divide("--grid", text, "simpo_beta=2,2.5,10")
        reader.values(f"--grid {key}", key, _listed(text, values))
    for text in search:
        key, values = _divide("--search", text, "lr=3e-7:1e-5:log")
        low, high, *rest = [*values.split(":"), ""][:3]
        if values.count(":") not in (1, 2) or rest not in ([""], ["log"]):
            raise ConfigError(f"--search {text}: expected KEY=LOW:HIGH or KEY=LOW:HIGH:log")
        reader.range(f"--search {key}", key, low, high, log=rest == ["log"])
    if not reader.origins:
        raise ConfigError("nothing to sweep: give --grid KEY=VALUE,VALUE, --search KEY=LOW:HIGH or --file FILE")
    return Space(reader.grid, reader.ranges, reader.points, reader.origins)


class _Reader:
    """Collects the parts of a space; every key may be named once."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.grid: dict[str, tuple[Any, ...]] = {}
        self.ranges: dict[str, Range] = {}
        self.points: dict[str, dict[str, Any]] = {}
        self.origins: dict[str, str] = {}

    def file(self, path: Path) -> None:
        sections = read_mapping(path)
        if unknown := [name for name in sections if name not in _SECTIONS]:
            raise ConfigError(f"{path}: unknown section `{unknown[0]}`; a sweep has {', '.join(_SECTIONS)}")
        for section, content in sections.items():
            if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
                raise ConfigError(f"{path}: `{section}`: expected `name: value` lines")
        for key, values in sections.get("grid", {}).items():
            listed = values if isinstance(values, list) else [values]
            self.values(f"{path}: grid: {key}", key, listed)
        for key, bounds in sections.get("search", {}).items():
            where = f"{path}: search: {key}"
            if not isinstance(bounds, dict) or not {"low", "high"} <= bounds.keys() <= {"low", "high", "log"}:
                raise ConfigError(f"{where}: expected {{low: LOW, high: HIGH}}, and log: true where wanted")
            self.range(where, key, bounds["low"], bounds["high"], log=bool(bounds.get("log", False)))
        self._points(path, sections.get("points", {}))

    def _points(self, path: Path, points: Mapping[str, Any]) -> None:
        for name, keys in points.items():
            where = f"{path}: points: {name}"
            if not isinstance(keys, dict):
                raise ConfigError(f"{where}: expected `key: value` lines, or {{}} for the configuration as it is")
            self.points[name] = {}
            for key, value in keys.items():
                known = self._known(f"{where}: {key}", key)
                if known not in self.origins:
                    self._note(f"{path}: points", known)
                elif known in self.grid or known in self.ranges:
                    raise ConfigError(f"{where}: `{known}` stands in {self.origins[known]} already")
                self.points[name][known] = _converted(known, value)

    def values(self, where: str, key: str, values: Sequence[Any]) -> None:
        key = self._note(where, self._known(where, key))
        converted = [_converted(key, value) for value in values]
        if not converted:
            raise ConfigError(f"{where}: expected at least one value")
        if twice := [value for index, value in enumerate(converted) if value in converted[:index]]:
            raise ConfigError(f"{where}: the value {twice[0]} appears twice")
        self.grid[key] = tuple(converted)

    def range(self, where: str, key: str, low: Any, high: Any, *, log: bool) -> None:
        key = self._note(where, self._known(where, key))
        kinds = _kinds(key)
        if takes_bool(Config.model_fields[key]) or not {int, float} & kinds:
            raise ConfigError(f"{where}: `{key}` is no number; give its values by --grid")
        whole = float not in kinds
        numbers = [_converted(key, bound) for bound in (low, high)]
        wanted = "a whole number" if whole else "a number"
        for bound in numbers:
            number = isinstance(bound, int if whole else int | float) and not isinstance(bound, bool)
            if not number or not math.isfinite(bound):
                raise ConfigError(f"{where}: expected {wanted} as bound, found {bound!r}")
        if not numbers[0] < numbers[1] or (log and numbers[0] <= 0):
            raise ConfigError(f"{where}: expected LOW below HIGH{', both above 0' if log else ''}, found {low}:{high}")
        self.ranges[key] = Range(numbers[0], numbers[1], log, whole)

    def _note(self, where: str, key: str) -> str:
        if key in self.origins:
            raise ConfigError(f"{where}: `{key}` stands in {self.origins[key]} already")
        self.origins[key] = where
        return key

    def _known(self, where: str, key: str) -> str:
        key = key.replace("-", "_")
        if key not in Config.model_fields:
            raise ConfigError(unknown_key(key, where, self.stage))
        if effect_of(Config.model_fields[key]) != "result":
            raise ConfigError(
                f"{where}: `{key}` does not change what training is to compute, so that its values give equal results; "
                f"{'the sweep sets it' if key in ('output_dir', 'load') else 'give it as a flag of its own'}"
            )
        if key in _HELD_OUT:
            raise ConfigError(f"{where}: `{key}` changes the held-out pairs, by which the trials are compared")
        return key


def label(value: Any) -> Any:
    """A value as Optuna stores it: numbers, texts, true, false and null as they are, others as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def _divide(flag: str, text: str, example: str) -> tuple[str, str]:
    key, equals, values = text.partition("=")
    if not equals or not key.strip() or not values.strip():
        raise ConfigError(f"{flag} {text}: expected KEY=..., such as {flag} {example}")
    return key.strip(), values.strip()


def _listed(text: str, values: str) -> list[Any]:
    try:
        listed = yaml.safe_load(f"[{values}]")
    except (yaml.YAMLError, ValueError):
        listed = None
    if not isinstance(listed, list) or values.strip().endswith(","):
        raise ConfigError(f"--grid {text}: expected values with commas between them, such as --grid simpo_beta=2,2.5")
    return listed


def _kinds(key: str) -> set[Any]:
    annotation = Config.model_fields[key].annotation
    return set(get_args(annotation)) or {annotation}


def _converted(key: str, value: Any) -> Any:
    """Numbers as the key has them: YAML reads `3e-7` as a text, and 2 is 2.0 where the key is a fraction."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    for kind in (int, float):
        if kind in _kinds(key) and not (kind is int and isinstance(value, float)):
            try:
                return kind(value)
            except ValueError:
                continue
    return value
