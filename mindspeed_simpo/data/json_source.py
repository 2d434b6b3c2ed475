"""JSON and JSON Lines files as sources: one example a line or array element, each with its line number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_simpo.data.foreign import refuse_foreign
from mindspeed_simpo.data.json_array import LONGEST, Text, elements
from mindspeed_simpo.data.json_decoder import StrictDecoder
from mindspeed_simpo.data.problems import found, malformed, printable, quoted
from mindspeed_simpo.data.source import Example, Source, Undecoded
from mindspeed_simpo.errors import DataError

_BOM = b"\xef\xbb\xbf"
_DECODER = StrictDecoder()
_HEAD = 64  # bytes by which a format is told


class JsonSource(Source):
    """A ``.jsonl`` or ``.json`` file; places are line numbers."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(name)
        self._path = path

    def digest(self) -> str:
        """See :meth:`Source.digest`."""
        digest = hashlib.sha256(self._path.suffix.lower().encode())
        with self._path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def count(self) -> int:
        """See :meth:`Source.count`."""
        if self._path.suffix.lower() == ".json":
            return sum(1 for _ in self.raw_examples())
        with self._path.open("rb") as file:
            return sum(1 for _ in file)

    def raw_examples(self) -> Iterator[Example]:
        """See :meth:`Source.raw_examples`."""
        return (_read_lines if self._path.suffix.lower() == ".jsonl" else _read_json)(self._path, self.name)


@dataclass(frozen=True)
class JsonLine(Undecoded):
    """A line of a JSON Lines file."""

    line: bytes

    def decode(self) -> Any:
        """See :meth:`Undecoded.decode`."""
        return _decoded(self.line)


def _read_lines(path: Path, name: str) -> Iterator[Example]:
    """One example a line, not decoded yet; blank lines are skipped.

    Raises:
        DataError: where the file as a whole is not JSON Lines: empty, UTF-16, or one JSON array.
    """
    examples = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = _without_bom(line, name)
                if line.lstrip()[:1] == b"[" and line.rstrip()[-1:] != b"]":
                    raise DataError(
                        f"{name}:1: a JSON array in a .jsonl file: name the file .json, or write one row a line"
                    )
            if line.strip():
                examples += 1
                yield number, JsonLine(line)
    if not examples:
        raise DataError(f"{name}: the file is empty; expected one JSON object a line")


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
