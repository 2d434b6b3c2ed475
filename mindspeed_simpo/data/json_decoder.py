"""JSON as its standard defines it."""

from __future__ import annotations

import json
from typing import Any

from mindspeed_simpo.data.problems import malformed, quoted


class StrictDecoder(json.JSONDecoder):
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
