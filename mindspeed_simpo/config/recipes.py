"""The shipped configurations of ``configs/recipes``, by name."""

from __future__ import annotations

import difflib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from mindspeed_simpo.errors import ConfigError

_IN_CLONE = Path(__file__).parents[2] / "configs" / "recipes"
_INSTALLED = Path(sysconfig.get_path("data")) / "share" / "mindspeed_simpo" / "recipes"
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
    folder = _IN_CLONE if _IN_CLONE.is_dir() else _INSTALLED
    return [_read(path) for path in sorted(folder.glob("*.yaml"))]


def configuration_path(name: str) -> Path:
    """The file of a configuration: ``name`` itself where there is such a file, else that of the recipe.

    Args:
        name: A path, or the name of a recipe, with or without ``.yaml``.

    Raises:
        ConfigError: where ``name`` is no file, and could be a recipe's name that there is not.
    """
    path = Path(name)
    if path.exists() or len(path.parts) != 1:
        return path
    known = {recipe.name: recipe.path for recipe in recipes()}
    if (stem := name.removesuffix(".yaml")) in known:
        return known[stem]
    if path.suffix:
        return path
    near = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{name}: neither a file nor a recipe (`mindspeed-simpo recipes` lists them){hint}")


def _read(path: Path) -> Recipe:
    lines = path.read_text(encoding="utf-8").splitlines()
    expect = next((line.removeprefix(_EXPECT) for line in lines if line.startswith(_EXPECT)), "")
    return Recipe(path, lines[0].removeprefix("# ").removesuffix("."), expect)
