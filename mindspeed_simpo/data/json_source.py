"""JSON and JSON Lines files as sources: one example a line or array element, each with its line number."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mindspeed_simpo.data.problems import found, malformed, printable, quoted
from mindspeed_simpo.data.source import Example, Source
from mindspeed_simpo.errors import DataError

_WHITESPACE = re.compile(r"[ \t\n\r]*")
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


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
            return sum(1 for _ in self.examples())
        with self._path.open("rb") as file:
            return sum(1 for _ in file)

    def examples(self) -> Iterator[Example]:
        """See :meth:`Source.examples`."""
        return (_read_lines if self._path.suffix.lower() == ".jsonl" else _read_json)(self._path, self.name)


class _StrictDecoder(json.JSONDecoder):
    """JSON as RFC 8259 defines it: ``complaint`` names what Python's decoder accepts beyond (NaN, duplicate keys)."""

    def __init__(self) -> None:
        self.complaint: str | None = None
        super().__init__(object_pairs_hook=self._object, parse_constant=self._constant)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            self.complaint = f"the key {quoted(twice)} appears twice in one object"
        return result

    def _constant(self, name: str) -> None:
        self.complaint = f"not valid JSON: {name} is no JSON value"

    def value_at(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at ``start``, or an ``ExampleError`` in its place, and the position after it.

        Raises:
            ValueError: where the text is not JSON.
        """
        self.complaint = None
        try:
            value, end = self.raw_decode(text, start)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        return (malformed(self.complaint) if self.complaint else value), end


def _read_lines(path: Path, name: str) -> Iterator[Example]:
    """One example a line; blank lines are skipped. A line that cannot be read is an ``ExampleError`` in its place.

    Raises:
        DataError: where the file as a whole is not JSON Lines: empty, UTF-16, or one JSON array.
    """
    decoder = _StrictDecoder()
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
                yield number, _line(decoder, line)
    if not examples:
        raise DataError(f"{name}: the file is empty; expected one JSON object a line")


def _line(decoder: _StrictDecoder, line: bytes) -> Any:
    try:
        text = line.strip().decode("utf-8")
        value, end = decoder.value_at(text, 0)
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
    try:
        text = _without_bom(path.read_bytes(), name).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{name}:{line}: not UTF-8: byte 0x{error.object[error.start]:02x}") from None
    start = _skip(text, 0)
    if start == len(text):
        raise DataError(f"{name}: the file is empty; expected a JSON array of rows")
    if text[start] == "{" and _is_object(text.lstrip().split("\n", 1)[0]):
        return _read_lines(path, name)
    if text[start] != "[":
        raise DataError(
            f"{name}:{_line_of(text, start)}: expected a JSON array of rows, found {_describe(text, start)}"
        )
    return _array(text, start + 1, name)


def _array(text: str, position: int, name: str) -> Iterator[Example]:
    decoder = _StrictDecoder()
    line, counted = 1, 0
    position = _skip(text, position)
    if text[position : position + 1] == "]":
        raise DataError(f"{name}: the array of rows is empty")
    while True:
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.value_at(text, position)
        except ValueError as error:
            at = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else f":{line}"
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)[:80]
            raise DataError(f"{name}{at}: not valid JSON: {reason}; the rest of the array cannot be read") from None
        yield line, value
        position = _skip(text, position)
        mark = text[position : position + 1]
        if mark not in (",", "]"):
            what = "the file ends inside the array" if not mark else f"expected , or ] between rows, found {mark!r}"
            raise DataError(f"{name}:{_line_of(text, position)}: not valid JSON: {what}")
        position = _skip(text, position + 1)
        if mark == "]":
            break
    if position < len(text):
        raise DataError(f"{name}:{_line_of(text, position)}: not valid JSON: more text after the array of rows")


def _without_bom(data: bytes, name: str) -> bytes:
    if data[:2] in _UTF16:
        raise DataError(f"{name}: the file is UTF-16; save it as UTF-8")
    return data.removeprefix(_BOM)


def _skip(text: str, position: int) -> int:
    match = _WHITESPACE.match(text, position)
    return int(match.end()) if match else position


def _line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _describe(text: str, start: int) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return printable(f"text that is not JSON: {text[start : start + 40]!r}")
    return found(value)
