"""What every kind of source has in common: examples in order, each with its place."""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mindspeed_simpo.data.problems import printable
from mindspeed_simpo.errors import DataError

Example = tuple[int, Any]
"""Number of the line, row or pair in its source, from 1, and the decoded value, or an ``ExampleError`` in its place."""


class Undecoded(ABC):
    """An example that is decoded where it is needed: workers decode their own, others skip it at no cost."""

    @abstractmethod
    def decode(self) -> Any:
        """The decoded value, or an ``ExampleError`` in its place."""


def decoded(value: Any) -> Any:
    """An example's value, decoded where it is not yet."""
    return value.decode() if isinstance(value, Undecoded) else value


@dataclass(frozen=True)
class Survey:
    """What one reading of a piece of a source tells."""

    digest: str
    """Hex SHA-256 of the content; the same wherever the data lies."""
    lines: int = 0
    """Ends of lines."""
    blank: bool = False
    """Whether the piece has white space only."""


Surveys = Mapping[tuple[int, int], Survey]
"""By the index of the source and that of its piece."""


class Source(ABC):
    """One file, one split of a data set, or one prefix of tokenised pairs."""

    place = "{name}:{number}"
    folder: Path | None = None
    """Folder that relative paths in the examples begin at; ``None`` where the source is no file."""
    block_examples = sys.maxsize
    """Largest number of examples that are held in memory together."""

    def __init__(self, name: str) -> None:
        self.name = name

    def where(self, number: int) -> str:
        """Name an example in a message."""
        return printable(self.place.format(name=self.name, number=number))

    @property
    def pieces(self) -> int:
        """Number of pieces that can be surveyed apart from each other."""
        return 1

    @abstractmethod
    def survey(self, piece: int) -> Survey:
        """Read a piece, from 0."""

    @cached_property
    def surveys(self) -> Sequence[Survey]:
        """Of the pieces, in order; read here, unless :func:`take_surveys` has set those that other ranks have read."""
        return list(survey_share([self], 0, 1).values())

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the surveys' digests."""
        return hashlib.sha256(" ".join(survey.digest for survey in self.surveys).encode()).hexdigest()

    @property
    @abstractmethod
    def places(self) -> int | None:
        """The number of the last example or a larger one; ``None`` where only reading all of the source tells it."""

    @abstractmethod
    def raw_examples(self, after: int = 0) -> Iterator[Example]:
        """The examples in order, some of them :class:`Undecoded`.

        Args:
            after: Leave out the examples up to this number; 0 where ``places`` is ``None``.

        Raises:
            DataError: where the source as a whole cannot be read.
        """

    def examples(self) -> Iterator[Example]:
        """The decoded examples in order.

        Raises:
            DataError: where the source as a whole cannot be read.
        """
        for number, value in self.raw_examples():
            yield number, decoded(value)


def survey_share(sources: Sequence[Source], index: int, count: int) -> dict[tuple[int, int], Survey]:
    """Surveys of every ``count``-th piece of all sources, from ``index`` on.

    Raises:
        DataError: where the data cannot be read.
    """
    try:
        pieces = [(number, piece) for number, source in enumerate(sources) for piece in range(source.pieces)]
        return {key: sources[key[0]].survey(key[1]) for key in pieces[index::count]}
    except OSError as error:
        raise DataError(f"{error.filename}: cannot read the data: {error.strerror}") from None


def take_surveys(sources: Sequence[Source], surveys: Surveys) -> None:
    """Give each source the surveys of its pieces; ``surveys`` has those of all pieces."""
    for number, source in enumerate(sources):
        source.surveys = [surveys[number, piece] for piece in range(source.pieces)]
