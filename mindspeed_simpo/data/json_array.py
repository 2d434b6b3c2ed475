"""The elements of a JSON array in a file of any size, decoded one by one."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from mindspeed_simpo.data.json_decoder import StrictDecoder
from mindspeed_simpo.data.source import Example
from mindspeed_simpo.errors import DataError

BLOCK = 1 << 20
"""Bytes that are read at a time."""
LONGEST = 1 << 26
"""Bytes that are searched for the end of one element."""
_WHITESPACE = re.compile(r"[ \t\n\r]*")
_LITERAL = 16  # characters that a number or a word cut off by the end of the text may have for another reading


class Text:
    """A window of a UTF-8 file that moves forward: what lies before it is forgotten, what lies after it is not read."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._end = False
        self.text = ""
        self.line = 1
        """Line of the first character of ``text``."""

    def read_more(self, size: int = BLOCK) -> bool:
        """Make the window longer by about ``size`` bytes; False at the end of the file.

        Raises:
            DataError: where the bytes are not UTF-8.
        """
        if self._end:
            return False
        data = self._file.read(size)
        self._end = not data
        try:
            self.text += self._decoder.decode(data, final=self._end)
        except UnicodeDecodeError as error:
            line = self.line_of(len(self.text)) + error.object[: error.start].count(b"\n")
            byte = error.object[error.start]
            raise DataError(f"{self._name}:{line}: not UTF-8: byte 0x{byte:02x}") from None
        return not self._end

    def forget(self, position: int) -> int:
        """Let the window begin at or shortly before ``position`` of its text.

        Returns:
            The new index of the same character.
        """
        # The rest of the text is copied: once a block, not once an element.
        if position < BLOCK and position < len(self.text):
            return position
        self.line = self.line_of(position)
        self.text = self.text[position:]
        return 0

    def line_of(self, position: int) -> int:
        """The line of the file in which a position of the text lies, from 1."""
        return self.line + self.text.count("\n", 0, position)

    def skip(self, position: int) -> int:
        """The position of the next character that is no white space, or the end of the file."""
        while True:
            match = _WHITESPACE.match(self.text, position)
            position = match.end() if match else position
            if position < len(self.text) or not self.read_more():
                return position


def elements(text: Text, start: int, name: str) -> Iterator[Example]:
    """The elements of the array whose first bracket is at ``start`` of the text, with their lines.

    Raises:
        DataError: where the array is empty or broken: the elements after the break cannot be read.
    """
    decoder = StrictDecoder()
    position = text.skip(start + 1)
    if text.text[position : position + 1] == "]":
        raise DataError(f"{name}: the array of rows is empty")
    line, counted = text.line_of(position), position
    while True:
        line += text.text.count("\n", counted, position)
        value, end = _next(text, position, decoder, name)
        yield line, value
        counted = position
        position = text.skip(end)
        mark = text.text[position : position + 1]
        if mark not in (",", "]") or not mark:
            what = "the file ends inside the array" if not mark else f"expected , or ] between rows, found {mark!r}"
            raise DataError(f"{name}:{text.line_of(position)}: not valid JSON: {what}")
        position = text.skip(position + 1)
        if mark == "]":
            break
        line += text.text.count("\n", counted, position)
        position = counted = text.forget(position)
    if position < len(text.text):
        raise DataError(f"{name}:{text.line_of(position)}: not valid JSON: more text after the array of rows")


def _next(text: Text, start: int, decoder: StrictDecoder, name: str) -> tuple[Any, int]:
    """The element at ``start`` of the text, and the position after it."""
    while True:
        try:
            value, end = decoder.value_at(text.text, start)
            goes_on = text.text[end : end + 1] in ("", ".", "e", "E") and end + _LITERAL > len(text.text)
            if not goes_on or not text.read_more():  # a number may go on
                return value, end
            continue
        except json.JSONDecodeError as error:
            # Only these two are kept: the error itself holds the text, and would live until garbage is collected.
            at, reason = error.pos, error.msg
        except ValueError as error:
            at, reason = start, str(error)[:80]
        size = len(text.text) - start
        cut_off = at + _LITERAL >= len(text.text) or reason.startswith("Unterminated string")
        if not cut_off or size > LONGEST or not text.read_more(max(size, BLOCK)):
            limit = f" (no end of the row within {LONGEST >> 20} MiB)" if size > LONGEST else ""
            where = f"{name}:{text.line_of(at)}"
            raise DataError(f"{where}: not valid JSON: {reason}{limit}; the rest of the array cannot be read")
