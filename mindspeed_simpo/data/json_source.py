"""JSON and JSON Lines files as sources: one example a line or array element, each with its line number."""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from mindspeed_simpo.data.foreign import refuse_foreign
from mindspeed_simpo.data.json_array import LONGEST, Text, elements
from mindspeed_simpo.data.json_decoder import StrictDecoder
from mindspeed_simpo.data.problems import found, malformed, printable, quoted
from mindspeed_simpo.data.source import Example, Source, Survey, Undecoded
from mindspeed_simpo.errors import DataError

_BOM = b"\xef\xbb\xbf"
_DECODER = StrictDecoder()
_HEAD = 64  # bytes by which a format is told
_READ_BYTES = 1 << 20
PIECE_BYTES = 64 << 20
"""Bytes of a piece: what is read to find a line is less than this."""


class JsonSource(Source):
    """A ``.jsonl`` or ``.json`` file; places are line numbers."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(name)
        self._path = path
        self.folder = path.parent

    @cached_property
    def pieces(self) -> int:
        """See :attr:`Source.pieces`."""
        return max(1, -(-self._path.stat().st_size // PIECE_BYTES))

    def survey(self, piece: int) -> Survey:
        """See :meth:`Source.survey`."""
        digest, lines, blank, left = hashlib.sha256(self._path.suffix.lower().encode()), 0, True, PIECE_BYTES
        with self._path.open("rb") as file:
            file.seek(piece * PIECE_BYTES)
            while block := file.read(min(_READ_BYTES, left)):
                digest.update(block)
                lines += block.count(b"\n")
                blank = blank and block.isspace()
                left -= len(block)
        return Survey(digest.hexdigest(), lines, blank)

    @property
    def places(self) -> int | None:
        """See :attr:`Source.places`."""
        return self._line_ends[-1] + 1 if self._has_lines else None

    def raw_examples(self, after: int = 0) -> Iterator[Example]:
        """See :meth:`Source.raw_examples`."""
        if not self._has_lines:
            return _read_json(self._path, self.name)
        if all(survey.blank for survey in self.surveys):
            raise DataError(f"{self.name}: the file is empty; expected one JSON object a line")
        # the piece in which line `after` ends
        piece = bisect.bisect_left(self._line_ends, after) if after else 0
        before = self._line_ends[piece - 1] if piece else 0
        return _read_lines(self._path, self.name, after, piece * PIECE_BYTES, before)

    @property
    def _has_lines(self) -> bool:
        return self._path.suffix.lower() == ".jsonl"

    @cached_property
    def _line_ends(self) -> list[int]:
        """Ends of lines up to the end of each piece."""
        return list(accumulate(survey.lines for survey in self.surveys))


@dataclass(frozen=True)
class JsonLine(Undecoded):
    """A line of a JSON Lines file."""

    line: bytes

    def decode(self) -> Any:
        """See :meth:`Undecoded.decode`."""
        return _decoded(self.line)


def _read_lines(path: Path, name: str, after: int = 0, start: int = 0, before: int = 0) -> Iterator[Example]:
    """One example a line, not decoded yet; blank lines are skipped.

    Args:
        path: Of the file.
        name: For messages.
        after: Leave out the lines up to this number.
        start: The byte at which reading begins.
        before: Ends of lines before ``start``, at most ``after``.

    Raises:
        DataError: where the file as a whole is not JSON Lines: UTF-16, or one JSON array.
    """
    with path.open("rb") as file:
        file.seek(start)
        for number, line in enumerate(file, start=before + 1):
            if number <= after:
                continue
            if number == 1:
                line = _without_bom(line, name)
                if line.lstrip()[:1] == b"[" and line.rstrip()[-1:] != b"]":
                    raise DataError(
                        f"{name}:1: a JSON array in a .jsonl file: name the file .json, or write one row a line"
                    )
            if line.strip():
                yield number, JsonLine(line)


def _decoded(line: bytes) -> Any:
    try:
        text = line.strip().decode("utf-8")
        value, end = _DECODER.value_at(text, 0)
    except UnicodeDecodeError as error:
        return malformed(f"not UTF-8: byte 0x{line.strip()[error.start]:02x} at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return malformed(f"not valid JSON: {error.msg} (column {error.colno})")
    except ValueError as error:
        return malformed(f"not valid JSON: {str(error)[:80]}")
    if end < len(text):
        return malformed(f"not valid JSON: more text after the object, at column {end + 1}")
    return value


def _read_json(path: Path, name: str) -> Iterator[Example]:
    """The elements of one JSON array, or, as the ``datasets`` library writes them, one object a line.

    Raises:
        DataError: where the file is empty, not UTF-8, or its array is broken: the examples after the break cannot be
            read, so that no option can leave out the broken one alone.
    """
    with path.open("rb") as file:
        start = _without_bom(file.read(_HEAD), name)
        file.seek(len(_BOM) if len(start) < file.tell() else 0)
        text = Text(file, name)
        first = text.skip(0)
        mark = text.text[first : first + 1]
        if not mark:
            raise DataError(f"{name}: the file is empty; expected a JSON array of rows")
        if mark == "[":
            yield from elements(text, first, name)
            return
        while "\n" not in text.text[first:] and len(text.text) < LONGEST and text.read_more():
            pass
        if mark != "{" or not _is_object(text.text[first:].split("\n", 1)[0]):
            while len(text.text) < LONGEST and text.read_more():
                pass
            line, what = text.line_of(first), _describe(text.text[first:])
            raise DataError(f"{name}:{line}: expected a JSON array of rows, found {what}")
    yield from _read_lines(path, name)


def _without_bom(data: bytes, name: str) -> bytes:
    refuse_foreign(data, name)
    return data.removeprefix(_BOM)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _describe(text: str) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return printable(f"text that is not JSON: {text[:40]!r}")
    lists = [key for key, rows in value.items() if isinstance(rows, list)] if isinstance(value, dict) else []
    return found(value) + (f"; write the list of {quoted(lists[:1])} alone into the file" if lists else "")
