"""The root folder of the page: every path that the page takes lies in it, links followed, or is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mindspeed_simpo.config.recipes import recipes
from mindspeed_simpo.errors import ConfigError

NO_PATHS = ("map_keys", "chat_template_kwargs")
"""Options whose texts never reach the file system: names of columns, variables of a template."""
_LONGEST_NAME = 255


class Root:
    """A folder, and what lies in it."""

    def __init__(self, folder: str | Path) -> None:
        """Take a folder.

        Raises:
            ConfigError: where there is no such folder.
        """
        self.folder = Path(folder).expanduser().resolve()
        if not self.folder.is_dir():
            raise ConfigError(f"--root: there is no folder {self.folder}")

    def inside(self, name: str, key: str) -> Path:
        """The place that a text names, seen from the root folder, with every link followed.

        Args:
            name: An absolute path, one relative to the root folder, or a hub id, which is the same as a relative path.
            key: What the text is, for the message.

        Raises:
            ConfigError: where the place, or what lies in it, is outside of the root folder.
        """
        if not isinstance(name, str) or "\0" in name or not name.isprintable():
            raise ConfigError(f"{key}: expected a path of printable characters, found {name!r}"[:400])
        if name.startswith("~"):
            raise ConfigError(f"{key}: {name!r}: write a path inside of {self.folder} in full, not from a home folder")
        if "://" in name or name.startswith("file:"):
            raise ConfigError(f"{key}: {name!r} is an address; expected a path inside of {self.folder}")
        if len(os.fsencode(name)) > 4096 or any(len(os.fsencode(part)) > _LONGEST_NAME for part in name.split("/")):
            raise ConfigError(f"{key}: the path is longer than a file system takes: {name[:80]}...")
        try:
            place = (self.folder / name).resolve()
            self._require(place, name, key)
            for entry in _links(place):
                self._require(entry.resolve(), f"{name} (its entry {entry.name})", key)
        except (OSError, RuntimeError, ValueError) as error:  # such as links in a circle
            raise ConfigError(f"{key}: {name!r} cannot be followed: {error}") from None
        return place

    def check(self, values: Mapping[str, Any]) -> None:
        """Refuse values of options that name a place outside of the root folder.

        Every text of every option is taken for a path, whatever the option, those in lists and mappings too, except
        :data:`NO_PATHS`: an option that is new here is refused rather than overlooked.

        Raises:
            ConfigError: one line for each such text.
        """
        problems = []
        for key, value in values.items():
            for text in [] if key in NO_PATHS else _texts(value):
                try:
                    if not (key == "chat_template" and is_shipped(text)):
                        self.inside(text, key)
                except ConfigError as error:
                    problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def shown(self) -> str:
        """The folder for readers, short where it lies in the home folder."""
        home = Path.home()
        return f"~/{self.folder.relative_to(home)}" if home in self.folder.parents else str(self.folder)

    def name(self, place: Path) -> str:
        """A place in the root folder as a relative path."""
        return str(place.relative_to(self.folder))

    def _require(self, place: Path, name: str, key: str) -> None:
        if not place.is_relative_to(self.folder):
            raise ConfigError(
                f"{key}: {name!r} lies outside of the root folder {self.folder}; the page uses nothing outside of it "
                "(`mindspeed-simpo ui --root FOLDER` takes another one)"
            )


def is_shipped(text: str) -> bool:
    """Whether a text is the full path of a file that lies beside the shipped recipes, such as a chat template."""
    return any(Path(text) == recipe.path.parent / Path(text).name for recipe in recipes()) and Path(text).is_file()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _links(place: Path) -> Iterator[Path]:
    """Links in a folder and in its folders; for the prefix of several files, links among these."""
    if place.is_dir():
        for entry in _entries(place):
            if entry.is_symlink():
                yield Path(entry.path)
            elif entry.is_dir() and not entry.name.startswith("."):
                yield from (Path(inner.path) for inner in _entries(entry.path) if inner.is_symlink())
    elif not place.exists() and place.parent.is_dir():
        for entry in _entries(place.parent):
            if entry.name.startswith(place.name) and entry.is_symlink():
                yield Path(entry.path)


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except PermissionError:
        return []
