"""What every kind of source has in common: examples in order, each with its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from mindspeed_simpo.data.problems import printable

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


class Source(ABC):
    """One file, one split of a data set, or one prefix of tokenised pairs."""

    place = "{name}:{number}"

    def __init__(self, name: str) -> None:
        self.name = name

    def where(self, number: int) -> str:
        """Name an example in a message."""
        return printable(self.place.format(name=self.name, number=number))

    @abstractmethod
    def digest(self) -> str:
        """Hex SHA-256 of the content; the same wherever the data lies."""

    @abstractmethod
    def count(self) -> int:
        """About the number of examples (blank lines of JSON Lines are counted too), for a progress bar."""

    @abstractmethod
    def raw_examples(self) -> Iterator[Example]:
        """The examples in order, some of them :class:`Undecoded`.

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
