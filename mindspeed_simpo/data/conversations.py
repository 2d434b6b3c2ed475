"""Examples to conversations: the columns of one example to a prompt with a chosen and a rejected answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_simpo.data import layouts
from mindspeed_simpo.data.column_names import ColumnNames
from mindspeed_simpo.data.image_places import MARK, with_images
from mindspeed_simpo.data.images import ImageReference, read_images
from mindspeed_simpo.data.problems import ExampleError, as_text, found, malformed, quoted
from mindspeed_simpo.data.turns import (
    Message,
    check_answer,
    check_prompt,
    read_message,
    read_messages,
    read_tools,
    shared_turns,
    whole_conversation,
    with_article,
)

_SPARE_MESSAGES_COLUMN = "messages"
_REJECTED_IMAGES = "rejected_images"


@dataclass(frozen=True)
class _Cells:
    """The columns of an example that are read, by canonical name, and the names that the data has for them."""

    values: dict[str, Any]
    columns: dict[str, str]
    example: Mapping[str, Any]

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def text(self, name: str) -> str:
        return as_text(self.values[name], self.columns[name])


@dataclass(frozen=True)
class ConversationPair:
    """One example: the shared turns and the two answers."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    """One assistant turn, or several with tool turns between; only assistant turns are scored."""
    rejected: tuple[Message, ...]
    tools: str | None = None
    """JSON list of tool descriptions, or ``None``."""
    folder: Path | None = None
    """Folder that relative paths of images begin at."""

    @property
    def images(self) -> list[ImageReference]:
        """The images of the prompt, in the order of their places."""
        return [place.image for turn in self.prompt for place in turn.images if place.image is not None]


class ExampleReader:
    """Recognise the form of an example by its columns.

    Canonical names are MindSpeed-LLM's ``--map-keys``: ``prompt`` (column ``prompt`` or ``instruction``), ``query``
    (``input``), ``response`` (``output``), ``history``, ``messages`` (``conversations``), ``system``, ``tools``,
    ``chosen``, ``rejected``, and ``tags`` with the key and role names inside messages. Beside them there are ``images``
    (``images`` or ``image``), ``label``, the column that says which of two responses is better, and ``score``, the
    column of the score of single answers. A canonical name that is mapped to an empty string reads no column. Layouts
    of published sets are those of :mod:`~mindspeed_simpo.data.layouts`.

    Args:
        map_keys: ``{canonical name: column}``, or ``None`` for the columns above.
        takes_images: Whether the model takes images.

    Raises:
        ConfigError: for an unknown canonical name or tag.
    """

    def __init__(self, map_keys: Mapping[str, str | dict[str, str]] | None, *, takes_images: bool = False) -> None:
        self._takes_images = takes_images
        self._names = ColumnNames.of(map_keys)
        self._columns = self._names.columns
        self.tags = self._names.tags
        self.score = self._names.score
        """Column of the score of single answers that ``map_keys`` names."""

    @property
    def column_names(self) -> list[str]:
        """Every column that any form of example may read."""
        names = [column for candidates in self._columns.values() for column in candidates]
        return [*dict.fromkeys([*names, _SPARE_MESSAGES_COLUMN, _REJECTED_IMAGES, *layouts.COLUMNS])]

    @property
    def prompt_columns(self) -> list[str]:
        """The columns that single answers to one prompt have in common."""
        names = ("prompt", "query", "history", "messages", "system", "tools", "images")
        return [*(column for name in names for column in self._columns[name]), *layouts.PROMPTS]

    def read(self, example: Any) -> ConversationPair:
        """Turn one decoded example into its conversations.

        Raises:
            ExampleError: naming the column or turn that is wrong, what was found and what was expected.
        """
        if not isinstance(example, Mapping):
            raise malformed(f"expected an object of columns, found {found(example)}")
        cells = self._select(self._plain(example))
        chosen, rejected = self._answers(cells)
        prompt = self._prompt(cells, chosen)
        chosen, rejected = (
            whole_conversation("chosen", prompt, chosen),
            whole_conversation("rejected", prompt, rejected),
        )
        shared = chosen[: shared_turns(chosen, rejected) if prompt is None else len(prompt)]
        answers = {"chosen": chosen[len(shared) :], "rejected": rejected[len(shared) :]}
        if cells.get("history") and (
            prompt is None or "messages" in cells.values or isinstance(cells.get("prompt"), list)
        ):
            raise malformed(f"`{cells.columns['history']}` goes with a text prompt, not with a list of messages")
        if "prompt" in cells.values and (prompt is None or "messages" in cells.values):
            _check_prompt_text(cells, shared)
        if "system" in cells.values:
            shared = self._with_system(cells.text("system"), shared)
        shared = with_images(shared, answers, self._images(cells), taken=self._takes_images)
        _check_answers(answers, len(chosen), len(rejected))
        check_prompt(shared)
        for name, answer in answers.items():
            check_answer(name, shared, answer)
        if answers["chosen"] == answers["rejected"]:
            raise ExampleError("identical", "chosen and rejected are the same text")
        tools = read_tools(cells.get("tools"), cells.columns["tools"]) if "tools" in cells.values else None
        return ConversationPair(tuple(shared), tuple(answers["chosen"]), tuple(answers["rejected"]), tools)

    def _plain(self, example: Mapping[str, Any]) -> Mapping[str, Any]:
        """The example in plain columns; ``map_keys`` that names the responses goes before every known layout."""
        if not self._names.mapped & {"chosen", "rejected", "response"}:
            example = layouts.plain_pair(example, self._names.label, self._names.mapped)
        if self._names.label != "":
            names = [column for name in ("chosen", "rejected") for column in self._columns[name]]
            if len(names) == 2 and all(example.get(name) is not None for name in names):
                layouts.refuse_unread_label(example, *names)
        return example

    def _select(self, example: Mapping[str, Any]) -> _Cells:
        for name, column in self._names.required.items():
            if column not in example:
                raise malformed(f"map_keys names the column `{column}` for `{name}`, the row has {quoted(example)}")
        cells = _Cells({}, {}, example)
        for name, candidates in self._columns.items():
            present = [column for column in candidates if example.get(column) is not None]
            if len(present) > 1:
                raise malformed(f"both {quoted(present)} could be the {name}; say which with map_keys")
            if present:
                cells.values[name] = example[present[0]]
                cells.columns[name] = present[0]
        spare = example.get(_SPARE_MESSAGES_COLUMN)
        if spare is not None and not (
            cells.values.keys() & {"messages", "prompt"} or _is_conversation(example.get("chosen"))
        ):
            # Whole conversations are not read twice: UltraFeedback repeats the chosen one in this column.
            cells.values["messages"] = spare
            cells.columns["messages"] = _SPARE_MESSAGES_COLUMN
        return cells

    def _answers(self, cells: _Cells) -> tuple[list[Message], list[Message]]:
        if self._columns["chosen"] == self._columns["rejected"] != ():
            both = "chosen"
        elif cells.values.keys() & {"chosen", "rejected"}:
            both = None
        else:
            both = "response" if "response" in cells.values else None
        if both is None:
            return self._answer_cell("chosen", cells), self._answer_cell("rejected", cells)
        # LLaMA-Factory's ranking form: one column holds [chosen, rejected].
        column = cells.columns.get(both, self._columns[both][0])
        pair = cells.get(both)
        if not isinstance(pair, list) or len(pair) != 2:
            raise malformed(f"{column}: expected a list of two texts, [chosen, rejected], found {found(pair)}")
        return self._answer(pair[0], f"{column}[0]"), self._answer(pair[1], f"{column}[1]")

    def _answer_cell(self, name: str, cells: _Cells) -> list[Message]:
        if name in cells.values:
            return self._answer(cells.get(name), cells.columns[name])
        column = self._columns[name][0] if self._columns[name] else name
        if column in cells.example:
            raise malformed(f"{column}: expected text, a message or a list of messages, found null")
        raise malformed(
            f"no {name} response: expected the column `{column}`, the row has {quoted(cells.example) or 'no columns'} "
            f"(`map_keys` tells other names){_rows_inside(cells.example)}"
        )

    def _answer(self, value: Any, where: str) -> list[Message]:
        if isinstance(value, str):
            return [Message("assistant", as_text(value, where))]
        if isinstance(value, Mapping):
            return [read_message(value, where, self.tags)]
        if isinstance(value, list):
            return read_messages(value, where, self.tags)
        raise malformed(f"{where}: expected text, a message or a list of messages, found {found(value)}")

    def _prompt(self, cells: _Cells, chosen: list[Message]) -> list[Message] | None:
        """The turns before the answer, or ``None`` where both answers are whole conversations."""
        for name in ("messages", "prompt"):
            if (name == "messages" and name in cells.values) or isinstance(cells.get(name), list):
                return read_messages(cells.get(name), cells.columns[name], self.tags)
        if chosen[0].role != "assistant":
            return None
        return self._question(cells)

    def _question(self, cells: _Cells) -> list[Message]:
        """The turns of a prompt that is a text, with the turns of ``history`` before it."""
        if not cells.values.keys() & {"prompt", "query"}:
            wanted = [*self._columns["prompt"], *self._columns["messages"]]
            null = [column for column in wanted if column in cells.example]
            raise malformed(
                f"no prompt: expected the column {quoted(wanted)}, or whole conversations in chosen and rejected; "
                f"the row has {quoted(cells.example)}{f', and {quoted(null)} is null' if null else ''} "
                "(`map_keys` tells other names)"
            )
        parts = [cells.text(name) for name in ("prompt", "query") if name in cells.values]
        question = Message("user", "\n".join(part for part in parts if part))
        return [*_history(cells.get("history"), cells.columns.get("history", "")), question]

    @staticmethod
    def _images(cells: _Cells) -> list[ImageReference]:
        if cells.example.get(_REJECTED_IMAGES):
            raise malformed(f"`{_REJECTED_IMAGES}`: the answers of a row share its prompt, images included")
        # some sets have an empty text where a row has no image
        return read_images(cells.get("images"), cells.columns["images"]) if cells.get("images") else []

    @staticmethod
    def _with_system(text: str, prompt: list[Message]) -> list[Message]:
        if not text.strip():
            return prompt
        if prompt and prompt[0].role == "system":
            if prompt[0].content == text:
                return prompt
            raise malformed("the `system` column and a system turn of the conversation differ; keep one of them")
        return [Message("system", text), *prompt]


def _rows_inside(example: Mapping[str, Any]) -> str:
    """Advice where the whole file seems to be one example."""
    lists = [name for name, value in example.items() if _is_conversation(value)]
    if len(lists) != 1 or not {"chosen", "rejected"} & {*example[lists[0]][0]}:
        return ""
    return f"; its `{lists[0]}` holds the rows: write that list alone, as a .json file"


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(item, Mapping) for item in value)


def _history(value: Any, column: str) -> list[Message]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise malformed(f"{column}: expected a list of [question, answer], found {found(value)}")
    turns: list[Message] = []
    for index, item in enumerate(value):
        where = f"{column}[{index}]"
        if not isinstance(item, list) or len(item) != 2:
            raise malformed(f"{where}: expected [question, answer], found {found(item)}")
        turns.append(Message("user", as_text(item[0], f"{where}[0]")))
        turns.append(Message("assistant", as_text(item[1], f"{where}[1]")))
    return turns


def _check_answers(answers: Mapping[str, list[Message]], *turns: int) -> None:
    """Check that only assistant and tool turns are in the answers; ``turns`` are those of both conversations."""
    for name, answer in answers.items():
        others = [message.role for message in answer if message.role not in ("assistant", "tool")]
        if others:
            raise malformed(
                f"chosen and rejected part at turn {turns[0] - len(answers['chosen']) + 1} of {turns[0]} and "
                f"{turns[1]}: an answer has assistant and tool turns only, {name} has {with_article(others[0])} turn"
            )


def _check_prompt_text(cells: _Cells, turns: list[Message]) -> None:
    """A prompt text beside whole conversations must be one of their user turns: else the example contradicts itself."""
    column, text = cells.columns["prompt"], cells.text("prompt").replace(MARK, "").strip()
    users = [message.content.replace(MARK, "").strip() for message in turns if message.role == "user"]
    if not any(text in user or (user and user in text) for user in users):
        raise malformed(f"the text of `{column}` is no user turn of the conversations beside it")
