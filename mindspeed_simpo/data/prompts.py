"""Rows to prompts: the turns that an answer would follow, from the rows of any preference data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindspeed_simpo.data import layouts
from mindspeed_simpo.data.conversations import ExampleReader, _Cells
from mindspeed_simpo.data.image_places import with_images
from mindspeed_simpo.data.problems import found, malformed
from mindspeed_simpo.data.turns import Message, check_prompt, read_messages, read_tools, shared_turns


@dataclass(frozen=True)
class Prompt:
    """The turns before an answer."""

    messages: tuple[Message, ...]
    tools: str | None = None
    """JSON list of tool descriptions, or ``None``."""


class PromptReader(ExampleReader):
    """Recognise the prompt of a row by its columns, which are those of :class:`ExampleReader`.

    A row may have answers, labels and scores: they are not read, beyond the turns that two whole conversations share.
    Of a list of turns that ends with an assistant's turn, that turn is an answer too.
    """

    def read_prompt(self, example: Any) -> Prompt:
        """The prompt of one decoded row.

        Raises:
            ExampleError: naming the column or turn that is wrong, what was found and what was expected.
        """
        if not isinstance(example, Mapping):
            raise malformed(f"expected an object of columns, found {found(example)}")
        cells = self._select(layouts.plain_prompt(example, self._names.mapped))
        turns = self._turns(cells)
        if "system" in cells.values:
            turns = self._with_system(cells.text("system"), turns)
        turns = with_images(turns, {}, self._images(cells), taken=self._takes_images)
        if any(turn.images for turn in turns):
            raise malformed("the row has images: answers are sampled to prompts of text alone")
        check_prompt(turns)
        tools = read_tools(cells.get("tools"), cells.columns["tools"]) if "tools" in cells.values else None
        return Prompt(tuple(turns), tools)

    def _turns(self, cells: _Cells) -> list[Message]:
        for name in ("messages", "prompt"):
            if (name == "messages" and name in cells.values) or isinstance(cells.get(name), list):
                turns = read_messages(cells.get(name), cells.columns[name], self.tags)
                return turns[:-1] if turns[-1].role == "assistant" else turns
        whole = [
            self._answer(cells.get(name), cells.columns[name])
            for name in ("chosen", "rejected")
            if isinstance(cells.get(name), list)
        ]
        whole = [turns for turns in whole if turns[0].role != "assistant"]
        if not whole:
            return self._question(cells)
        return whole[0][: shared_turns(whole[0], whole[-1]) if len(whole) == 2 else len(whole[0]) - 1]
