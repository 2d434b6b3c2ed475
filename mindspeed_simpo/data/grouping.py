"""Single answers, each with a score: the adjacent rows of one prompt become one example with a list of answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mindspeed_simpo.data.layouts import number, single_answer
from mindspeed_simpo.data.problems import ExampleError, malformed
from mindspeed_simpo.data.source import Example


def grouped(examples: Iterable[Example], prompts: Sequence[str], score: str | None) -> Iterator[Example]:
    """The examples, with the single answers to one prompt as one example, numbered as the first of them.

    Args:
        examples: Of one source. Other examples pass unchanged.
        prompts: The columns in which the rows of one prompt agree.
        score: The column of the score, or ``None`` for the known ones.

    Yields:
        In place of a group whose prompt appeared before, apart from it, an ``ExampleError``.
    """
    group: _Group | None = None
    seen: dict[bytes, int] = {}
    for place, example in examples:
        columns = single_answer(example, prompts, score)
        key = None if columns is None else _key(example, prompts, columns)
        if group is not None and (key is None or key != group.key):
            yield group.number, group.example(seen)
            group = None
        if columns is None or key is None:
            yield place, example
            continue
        group = group or _Group(place, key, example, columns)
        group.add(example)
    if group is not None:
        yield group.number, group.example(seen)


def _key(example: Any, prompts: Sequence[str], columns: tuple[str, str]) -> bytes:
    shared = {name: example.get(name) for name in prompts}
    return hashlib.sha256(json.dumps([shared, columns], sort_keys=True, default=str).encode()).digest()[:16]


class _Group:
    """The answers to one prompt so far."""

    def __init__(self, place: int, key: bytes, first: Any, columns: tuple[str, str]) -> None:
        self.number, self.key = place, key
        self._text, self._score = columns
        self._shared = {name: value for name, value in first.items() if name not in columns}
        self._answers: list[dict[str, Any]] = []
        self._problem: ExampleError | None = None

    def add(self, example: Any) -> None:
        text = example[self._text]
        text = text[0] if isinstance(text, list) else text
        try:
            self._answers.append({"text": text, "score": number(example[self._score], self._score)})
        except ExampleError as error:
            self._problem = self._problem or error

    def example(self, seen: dict[bytes, int]) -> Any:
        """The group as an example; ``seen`` maps the keys of earlier groups to their first rows, and gains this one."""
        earlier = seen.setdefault(self.key, self.number)
        if earlier != self.number:
            return malformed(
                f"the answers to this prompt are not in adjacent rows (others begin at {earlier}): sort by prompt"
            )
        return self._problem or {**self._shared, "answers": self._answers}
