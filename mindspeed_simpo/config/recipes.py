"""The shipped configurations of ``configs/recipes`` and sweeps of ``configs/sweeps``, by name."""

from __future__ import annotations

import difflib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from mindspeed_simpo.errors import ConfigError

_IN_CLONE = Path(__file__).parents[2] / "configs"
_INSTALLED = Path(sysconfig.get_path("data")) / "share" / "mindspeed_simpo"
_EXPECT = "# Expect: "


@dataclass(frozen=True)
class Recipe:
    """A configuration with the text at its head."""

    path: Path
    title: str
    """First line, without a full stop."""
    expect: str
    """What a run gives, as far as it is known."""

    @property
    def name(self) -> str:
        """What ``train`` takes."""
        return self.path.stem


def recipes() -> list[Recipe]:
    """All recipes, by name; none where they are not installed."""
    return [_read(path) for path in _shipped("recipes").values()]


def configuration_path(name: str) -> Path:
    """The file of a configuration: ``name`` itself where there is such a file, else that of the recipe.

    Args:
        name: A path, or the name of a recipe, with or without ``.yaml``.

    Raises:
        ConfigError: where ``name`` is no file, and could be a recipe's name that there is not.
    """
    return _find(name, _shipped("recipes"), "recipe (`mindspeed-simpo recipes` lists them)")


def sweep_path(name: str) -> Path:
    """The file of a sweep: ``name`` itself where there is such a file, else that of the shipped sweep.

    Raises:
        ConfigError: where ``name`` is no file, and could be a shipped sweep's name that there is not.
    """
    shipped = _shipped("sweeps")
    return _find(name, shipped, f"shipped sweep ({', '.join(shipped) or 'there is none'})")


def _shipped(kind: str) -> dict[str, Path]:
    folder = _IN_CLONE / kind if (_IN_CLONE / kind).is_dir() else _INSTALLED / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _find(name: str, shipped: dict[str, Path], what: str) -> Path:
    path = Path(name)
    if path.exists() or len(path.parts) != 1:
        return path
    if (stem := name.removesuffix(".yaml")) in shipped:
        return shipped[stem]
    if path.suffix:
        return path
    near = difflib.get_close_matches(name, shipped, 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{name}: neither a file nor a {what}{hint}")


def _read(path: Path) -> Recipe:
    lines = path.read_text(encoding="utf-8").splitlines()
    expect = next((line.removeprefix(_EXPECT) for line in lines if line.startswith(_EXPECT)), "")
    return Recipe(path, lines[0].removeprefix("# ").removesuffix("."), expect)
