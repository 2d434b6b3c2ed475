"""Whether a chat template rendered what it was given: no turn, call or reasoning is lost without a word."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mindspeed_simpo.data.problems import ExampleError, malformed
from mindspeed_simpo.data.turns import REASONING_KEYS, Message

_END_OF_THOUGHT = "</think>"


def check_prompt_kept(messages: Sequence[Message], prompt: str) -> None:
    """Check that the rendered prompt has the text of every turn.

    The reasoning of earlier assistant turns may be absent: templates of reasoning models leave it out, as at
    generation.

    Raises:
        ExampleError: naming the role of the turn.
    """
    bare = _bare(prompt)
    for message in messages:
        for text in message.pieces:
            if message.role == "assistant":
                text = text.rpartition(_END_OF_THOUGHT)[2]
            # Some templates write the result of a tool as JSON text.
            if _bare(text) not in bare and _bare(json.dumps(text, ensure_ascii=False)[1:-1]) not in bare:
                raise malformed(f"the chat template leaves out the {message.role} turn")
        if lost := _lost_call(message, bare):
            raise malformed(f"the chat template leaves out the call of `{lost}` of an assistant turn")


def check_system_in_place(name: str, messages: Sequence[Message], prompt: str, whole: str) -> None:
    """Check that the system turn stands where it stood before the answer.

    Args:
        name: ``chosen`` or ``rejected``.
        messages: The prompt.
        prompt: As rendered.
        whole: The rendered conversation.

    Raises:
        ExampleError: of kind ``not_prefix``.
    """
    text = messages[0].content.strip()
    if messages[0].role == "system" and text and prompt.find(text) != whole.find(text):
        raise ExampleError(
            "not_prefix",
            f"{name}: the chat template moves or drops the system turn once the conversation has an answer: write its "
            "text into the user turn, or use a chat_template that keeps it in place",
        )


def check_response_kept(name: str, answer: Message, rendered: str) -> None:
    """Check that a rendered response has the answer's text, reasoning and calls; white space may differ.

    Args:
        name: ``chosen`` or ``rejected``.
        answer: As given.
        rendered: What follows the rendered prompt.

    Raises:
        ExampleError: saying what is lost.
    """
    bare = _bare(rendered)
    for key in REASONING_KEYS:
        if _bare(answer.extras.get(key, "")) not in bare:
            raise malformed(
                f"{name}: the chat template leaves out `{key}`: write the reasoning into the text as the model "
                "generates it, use a chat_template that keeps it, or remove the key"
            )
    if lost := _lost_call(answer, bare):
        raise malformed(f"{name}: the chat template leaves out the call of `{lost}`")
    if _bare(answer.content) in bare:
        return
    thought, mark, rest = answer.content.rpartition(_END_OF_THOUGHT)
    if mark and _bare(rest) in bare and _bare(thought) not in bare:
        raise malformed(
            f"{name}: the chat template deletes the reasoning of the response, all that stands before {mark}; use a "
            "chat_template that keeps it, or remove the reasoning from the data"
        )
    raise malformed(
        f"{name}: the chat template changes the text of the response, from {answer.content[:40]!r} to "
        f"{rendered[:40]!r}; use a chat_template that keeps it"
    )


def _lost_call(message: Message, bare: str) -> str | None:
    """The name of the first call that the rendered text does not have."""
    calls = json.loads(message.tool_calls) if message.tool_calls is not None else []
    names = [str(call.get("function", call)["name"]) for call in calls]
    return next((name for name in names if _bare(name) not in bare), None)


def _bare(text: str) -> str:
    return "".join(text.split())
