"""The sources of pairs: the entries of ``data_path`` and ``eval_data_path``, as paths or as mappings."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

from pydantic import ValidationError, field_validator, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from mindspeed_simpo.config.options.base import Options, option

ENTRY_ERROR = "data_source"
"""Type of the validation error of an entry; ``ctx["problems"]`` lists ``(place in the value, message)``."""
_SUFFIXES = (".jsonl", ".json", ".parquet")
_SIZES = re.compile(r"[-+.eE\d\s]*|.*,.*")


class DataSource(Options):
    """One source of pairs: a path, and what is wanted of it."""

    path: str = option(..., effect="result", description="A file, a folder, a prefix of tokenised pairs or a hub id.")
    split: str | None = option(
        None,
        effect="result",
        description="Relative sizes of the train and eval parts of this source, such as 95,5, in place of the key "
        "`split`; or the name of a split of a data set of the hub or of `save_to_disk`.",
    )
    weight: float | None = option(
        None, gt=0, effect="result", description="Share of the pairs of an epoch, relative to other weights."
    )
    pairs: int | None = option(None, ge=1, effect="result", description="Number of pairs of an epoch.")
    map_keys: dict[str, str | dict[str, str]] | None = option(
        None, effect="result", description="Column names of this source, in place of the key `map_keys`."
    )
    name: str | None = option(None, effect="none", description="Name in metrics and messages.")

    @field_validator("path")
    @classmethod
    def _path_is_given(cls, value: str) -> str:
        if not value:
            raise ValueError("expected a path")
        return value

    @field_validator("name")
    @classmethod
    def _name_fits_a_key(cls, value: str | None) -> str | None:
        if value is not None and (not value or "/" in value or not value.isprintable() or value != value.strip()):
            raise ValueError("expected a name without / and without spaces around it")
        return value

    @field_validator("split")
    @classmethod
    def _split_is_sizes_or_a_name(cls, value: str | None) -> str | None:
        if value is not None and _SIZES.fullmatch(value):
            split_weights(value)
        return value

    @model_validator(mode="after")
    def _one_number(self) -> DataSource:
        if self.weight is not None and self.pairs is not None:
            raise ValueError("weight and pairs exclude each other: give one of the two")
        return self

    @model_serializer
    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if value is not None}

    @property
    def sizes(self) -> str | None:
        """``split`` where it gives relative sizes of parts."""
        return self.split if self.split is not None and _SIZES.fullmatch(self.split) else None

    @property
    def split_name(self) -> str | None:
        """``split`` where it names a split of a data set."""
        return self.split if self.sizes is None else None


def split_weights(split: str) -> list[float]:
    """The relative sizes of the train, the eval and the unused part.

    Raises:
        ValueError: saying what was expected.
    """
    try:
        weights = [float(part) for part in split.split(",")]
    except ValueError:
        raise ValueError("expected two or three comma-separated weights, such as 95,5") from None
    if not math.isfinite(sum(weights)):
        raise ValueError("expected two or three finite weights, such as 95,5")
    if not 1 <= len(weights) <= 3 or min(weights) < 0 or weights[0] <= 0:
        raise ValueError("expected two or three weights of at least 0, the first above 0, such as 95,5")
    return [*weights, 0.0, 0.0][:3]


def read_sources(value: Any) -> Any:
    """The value of ``data_path`` or ``eval_data_path`` with its mappings as :class:`DataSource`.

    Raises:
        PydanticCustomError: of type ``ENTRY_ERROR``, with every wrong entry.
    """
    problems: list[tuple[str, str]] = []
    entries = value if isinstance(value, list) else [value]
    read = [
        _read(entry, f"[{number}]" if isinstance(value, list) else "", problems) for number, entry in enumerate(entries)
    ]
    if problems:
        raise PydanticCustomError(ENTRY_ERROR, "wrong entries", {"problems": problems})
    return read if isinstance(value, list) else read[0]


def check_numbers(sources: Sequence[DataSource], *, evaluated: bool) -> None:
    """Check weights, numbers of pairs and names across the sources of one key.

    Raises:
        PydanticCustomError: as :func:`read_sources`.
    """
    problems: list[tuple[str, str]] = []
    weighted = next((number for number, source in enumerate(sources) if source.weight is not None), None)
    for number, source in enumerate(sources):
        if evaluated and source.weight is not None:
            problems.append(
                (f"[{number}].weight", "held-out pairs are evaluated once each: leave it out, or give `pairs`")
            )
        elif not evaluated and weighted is not None and source.weight is None and source.pairs is None:
            problems.append(
                (f"[{number}]", f"neither weight nor pairs, while [{weighted}] has a weight: give it one of the two")
            )
        if evaluated and source.sizes is not None:
            problems.append(
                (
                    f"[{number}].split",
                    "sizes of parts divide data_path only: leave it out",
                )
            )
    given = [source.name for source in sources]
    for name, times in Counter(name for name in given if name is not None).items():
        if times > 1:
            last = len(given) - 1 - given[::-1].index(name)
            problems.append((f"[{last}].name", f"`{name}` is the name of {times} sources: give each its own"))
    if problems:
        raise PydanticCustomError(ENTRY_ERROR, "wrong entries", {"problems": problems})


def named(sources: Sequence[DataSource]) -> list[DataSource]:
    """The sources, each with a name of its own.

    A source without one is named by its file, folder or data set; where that is taken, by the folder around it too, and
    where that is taken, by a number.
    """
    taken = {source.name for source in sources if source.name is not None}
    short = [_names_of(source)[-1] for source in sources]
    automatic = Counter(name for source, name in zip(sources, short, strict=True) if source.name is None)
    repeated = {name for name, times in automatic.items() if times > 1} | taken
    found = []
    for source, name in zip(sources, short, strict=True):
        if source.name is None:
            wanted = ".".join(_names_of(source)) if name in repeated else name
            unique = next(each for each in _numbered(wanted) if each not in taken)
            taken.add(unique)
            source = source.model_copy(update={"name": unique})
        found.append(source)
    return found


def _read(entry: Any, place: str, problems: list[tuple[str, str]]) -> Any:
    if isinstance(entry, DataSource):
        return entry
    if isinstance(entry, str):
        if not entry:
            problems.append((place, "expected a path"))
        elif entry.startswith("{"):
            problems.append((place, f"not valid JSON of a mapping: {entry}"))
        return entry
    if not isinstance(entry, dict):
        problems.append((place, f"expected a path or a mapping with `path`, found {entry!r}"))
        return entry
    try:
        return DataSource(**{str(key): value for key, value in entry.items()})
    except ValidationError as error:
        found = [_problem(item, place) for item in error.errors(include_url=False)]
        problems += {within: (within, text) for within, text in reversed(found)}.values()
        return entry


def _problem(item: Any, place: str) -> tuple[str, str]:
    key = ".".join(str(part) for part in item["loc"][:1])
    within = f"{place}.{key}" if key else place
    if item["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, DataSource.model_fields, n=1, cutoff=0.6)
        hint = f"did you mean `{nearest[0]}`?" if nearest else f"an entry has {', '.join(DataSource.model_fields)}"
        return within, f"unknown key; {hint}"
    if item["type"] == "missing":
        return within, f"required: {DataSource.model_fields[key].description}"
    message = item["msg"].removeprefix("Value error, ")
    return within, f"{message[0].lower()}{message[1:]}" + (f", found {item['input']!r}" if key else "")


def _names_of(source: DataSource) -> list[str]:
    """The last two names of a path, the last one without suffix and without the split of a hub id."""
    parts = [part for part in PurePath(source.path).parts if part not in ("/", ".", "..", "~")] or [source.path]
    last = parts[-1]
    suffix = next((suffix for suffix in _SUFFIXES if last.lower().endswith(suffix)), "")
    last = last[: len(last) - len(suffix)].partition(":")[0] or last
    return [re.sub(r"[^\w.-]+", "_", part) for part in (*parts[-2:-1], last)]


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1
