"""What chat templates do with system turns, several turns, thinking and tools: a Markdown table.

    python -m scripts.describe_templates MODEL [MODEL ...]

MODEL is a folder or a hub id with a tokenizer; its last part names the row. Each cell is what the program does with one
example: what is scored, or why the example is refused.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_simpo.data.conversations import ExampleReader
from mindspeed_simpo.data.problems import ExampleError
from mindspeed_simpo.data.template import ChatFormat, Segment, TemplateSettings
from mindspeed_simpo.data.tokenizer import load_tokenizer
from mindspeed_simpo.errors import SimpoError

QUESTION = {"role": "user", "content": "Is it sunny in Paris?"}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Its name."}}},
    },
}
REASONS = {
    "opens a thought": "generation prompt opens a thought",
    "deletes the reasoning": "deletes the reasoning",
    "leaves out `reasoning_content`": "leaves it out",
    "not a prefix": "prompt is no prefix of the conversation",
    "does not take": "takes no tools",
    "leaves out the call": "leaves out the call",
    "leaves out the tool turn": "leaves out the result",
    "moves or drops the system turn": "moves it",
    "renders no text": "leaves it out",
    "leaves out an assistant turn": "leaves out a turn",
    "the token that ends a call": "does not render its end",
    "renders no <": "ends it with another token",
}


def says(text: str, **more: Any) -> dict[str, Any]:
    """An assistant turn."""
    return {"role": "assistant", "content": text, **more}


def example(*before: dict[str, Any], answer: Any = "Yes.", **columns: Any) -> dict[str, Any]:
    """A row with a prompt of turns, a chosen answer and another one."""
    return {"prompt": [*before, QUESTION], "chosen": answer, "rejected": "I do not know.", **columns}


EXAMPLES = {
    "system turn": example({"role": "system", "content": "Be brief."}),
    "several turns": example({"role": "user", "content": "Hello."}, says("Good day.")),
    "thought in the text": example(answer="<think>\nParis lies in sun.\n</think>\n\nYes."),
    "`reasoning_content`": example(answer=[says("Yes.", reasoning_content="Paris lies in sun.")]),
    "call": example(answer=[says("", tool_calls=[CALL])], tools=[TOOL]),
    "call, result, answer": example(
        answer=[
            says("", tool_calls=[CALL]),
            {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "sunny"},
            says("Yes."),
        ],
        tools=[TOOL],
    ),
}


@dataclass(frozen=True)
class Described:
    """A row of the table."""

    end_of_turn: str
    cells: list[str]
    notes: list[str]


def described(model: str, kwargs: dict[str, Any] | None = None) -> Described:
    """What the template of a model does with each example.

    Raises:
        SimpoError: where the template cannot serve at all.
    """
    tokenizer = load_tokenizer(model, None)
    chat_format = ChatFormat(tokenizer, TemplateSettings(kwargs or {}))
    cells = [cell(chat_format, row) for row in EXAMPLES.values()]
    return Described(str(tokenizer.convert_ids_to_tokens(chat_format.end_of_turn_id)), cells, chat_format.notes())


def cell(chat_format: ChatFormat, row: dict[str, Any]) -> str:
    """The text of a cell: ``yes``, or the reason of the refusal."""
    try:
        pair = chat_format.render(ExampleReader(None).read(row))
    except ExampleError as error:
        short = next((short for sign, short in REASONS.items() if sign in error.message), None)
        return f"no: {short or error.message.removeprefix('the chat template refuses the conversation: ')[:60]}"
    return "yes" if len(pair.chosen) == 1 else f"yes, {_scored(pair.chosen)}"


def _scored(segments: tuple[Segment, ...]) -> str:
    count = sum(segment.scored for segment in segments)
    return "thought not scored" if count == 1 else f"{count} turns scored"


def main(models: list[str]) -> None:
    """Print the table of the models."""
    lines = [["template", "end of turn", *EXAMPLES, "of itself"], ["---"] * (len(EXAMPLES) + 3)]
    for model in models:
        try:
            row = described(model)
            cells = [f"`{row.end_of_turn}`", *row.cells, "; ".join(row.notes) or "-"]
        except SimpoError as error:
            cells = [f"refused: {error}", *["-"] * (len(EXAMPLES) + 1)]
        lines.append([Path(model).name, *cells])
    sys.stdout.writelines(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    main(sys.argv[1:])
