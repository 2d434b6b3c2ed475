"""The turns of a conversation: read from any of the message forms, and checked for their order."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mindspeed_simpo.data.images import ImageReference, read_image
from mindspeed_simpo.data.problems import ExampleError, as_text, found, malformed

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names of the reasoning of an assistant turn beside its text."""
_EXTRA_KEYS = ("name", "tool_call_id", *REASONING_KEYS)


@dataclass(frozen=True)
class PlacedImage:
    """A place for an image in the text of a turn."""

    offset: int
    """Characters of the text before it."""
    image: ImageReference | None = None
    """``None`` for the next image of the example's column."""


@dataclass(frozen=True)
class Message:
    """One turn. Structured parts stay JSON text, so that a conversation goes to worker processes as plain strings."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: str | None = None
    """JSON list of calls in the form that chat templates read, or ``None``."""
    extras: Mapping[str, str] = field(default_factory=dict)
    images: tuple[PlacedImage, ...] = ()
    """In the order of their places."""

    @property
    def pieces(self) -> list[str]:
        """The texts before, between and after the images."""
        bounds = [0, *(place.offset for place in self.images), len(self.content)]
        return [self.content[start:stop] for start, stop in itertools.pairwise(bounds)]

    def for_template(self, reasoning_key: str | None = None, *, as_parts: bool = False) -> dict[str, Any]:
        """The dictionary that a chat template reads.

        Args:
            reasoning_key: The template's name for reasoning; ``None`` keeps that of the data.
            as_parts: Whether the content of a turn without images is a list of parts too, not a text.
        """
        content: Any = self.content
        if self.images or as_parts:
            first, *others = self.pieces
            content = [{"type": "text", "text": first}] if first else []
            for piece in others:
                content += [{"type": "image"}, *([{"type": "text", "text": piece}] if piece else [])]
        message: dict[str, Any] = {"role": self.role, "content": content, **self.extras}
        for key in REASONING_KEYS if reasoning_key is not None else ():
            if key in message:
                message[reasoning_key or key] = message.pop(key)
        if self.tool_calls is not None:
            message["tool_calls"] = json.loads(self.tool_calls)
        return message


@dataclass(frozen=True)
class Tags:
    """Key and role names of message dictionaries; the defaults are sharegpt's (MindSpeed-LLM's ``tags``)."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"

    def roles(self) -> dict[str, str]:
        """``{role name in the data: role}``, for the configured role names and those of chat templates."""
        return {
            "system": "system",
            "user": "user",
            "assistant": "assistant",
            "tool": "tool",
            self.system_tag: "system",
            self.user_tag: "user",
            self.assistant_tag: "assistant",
            self.observation_tag: "tool",
            self.function_tag: "function",
        }


def with_article(role: str) -> str:
    """The role with its article."""
    return f"{'an' if role[:1] in 'aeiou' and role != 'user' else 'a'} {role}"


def read_messages(value: Any, where: str, tags: Tags) -> list[Message]:
    """Read a list of ``{role, content}`` or ``{from, value}`` objects.

    Raises:
        ExampleError: naming the element and key that is wrong.
    """
    if not isinstance(value, list):
        raise malformed(f"{where}: expected a list of messages, found {found(value)}")
    if not value:
        raise ExampleError("empty", f"{where}: the list of messages is empty")
    return [read_message(item, f"{where}[{index}]", tags) for index, item in enumerate(value)]


def read_message(value: Any, where: str, tags: Tags) -> Message:
    """Read one ``{role, content}`` or ``{from, value}`` object.

    Raises:
        ExampleError: naming the key that is wrong.
    """
    if not isinstance(value, Mapping):
        raise malformed(f"{where}: expected a message object, found {found(value)}")
    value = {key: item for key, item in value.items() if item is not None}
    role_key, content_key = ("role", "content") if "role" in value else (tags.role_tag, tags.content_tag)
    if role_key not in value:
        raise malformed(f"{where}: expected the keys `role` and `content`, or `{tags.role_tag}` and "
                        f"`{tags.content_tag}`, found {found(value)}")  # fmt: skip
    role = _read_role(value[role_key], f"{where}.{role_key}", tags)
    calls = value.get("tool_calls")
    if content_key not in value and not calls:
        raise malformed(f"{where}: `{content_key}` is missing or null")
    content, images = _read_content(value.get(content_key, ""), f"{where}.{content_key}")
    if role == "function":
        return Message("assistant", "", tool_calls=_calls_of_text(content, f"{where}.{content_key}"))
    if calls and role != "assistant":
        raise malformed(f"{where}: only an assistant turn can have `tool_calls`, this is {with_article(role)} turn")
    if role != "assistant" and (given := [key for key in REASONING_KEYS if value.get(key)]):
        raise malformed(f"{where}: only an assistant turn can have `{given[0]}`, this is {with_article(role)} turn")
    extras = {key: as_text(value[key], f"{where}.{key}") for key in _EXTRA_KEYS if value.get(key)}
    tool_calls = _dump(_checked_calls(calls, f"{where}.tool_calls"), f"{where}.tool_calls") if calls else None
    return Message(role, content, tool_calls, extras, images)  # type: ignore[arg-type]


def _read_content(value: Any, where: str) -> tuple[str, tuple[PlacedImage, ...]]:
    """The text of a turn and its image places, from a text or a list of parts."""
    if not isinstance(value, list):
        return as_text(value, where), ()
    text, images = "", []
    for index, part in enumerate(value):
        place = f"{where}[{index}]"
        if isinstance(part, str):
            text += as_text(part, place)
            continue
        if not isinstance(part, Mapping):
            raise malformed(f"{place}: expected a part with a `type`, found {found(part)}")
        given = {key: item for key, item in part.items() if item is not None}
        kind = given.pop("type", "text" if "text" in given else "image" if "image" in given else None)
        if kind == "text":
            text += as_text(given.get("text"), f"{place}.text")
        elif kind in ("image", "image_url"):
            images.append(PlacedImage(len(text), _image_of_part(given, place)))
        else:
            raise malformed(f"{place}: a part of type {kind!r}: expected text or image")
    return text, tuple(images)


def _image_of_part(part: Mapping[str, Any], where: str) -> ImageReference | None:
    """The image that a part names; ``None`` for a part that is only a place."""
    named = part.get("image_url", part.get("image"))
    if named is not None and not (isinstance(named, Mapping) and not any(named.values())):
        return read_image(named, where)
    kept = {key: part[key] for key in ("bytes", "base64", "path", "url") if part.get(key)}
    return read_image(kept, where) if kept else None


def _read_role(value: Any, where: str, tags: Tags) -> str:
    roles = tags.roles()
    if not isinstance(value, str) or value not in roles:
        raise malformed(f"{where}: unknown role, {found(value)}; expected one of {', '.join(roles)}")
    return roles[value]


def _calls_of_text(content: str, where: str) -> str:
    try:
        calls = json.loads(content)
    except (ValueError, RecursionError):
        raise malformed(f"{where}: expected a function call as JSON, found {found(content)}") from None
    calls = calls if isinstance(calls, list) else [calls]
    return _dump(_checked_calls([{"type": "function", "function": call} for call in calls], where), where)


def _checked_calls(calls: Any, where: str) -> list[Any]:
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise malformed(f"{where}: expected a list of calls, found {found(calls)}")
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise malformed(f"{where}: a function call needs a `name`, found {found(function)}")
    return calls


def _dump(value: Any, where: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise malformed(f"{where}: not plain JSON: {error}") from None
    return as_text(text, where)


def read_tools(value: Any, where: str) -> str | None:
    """JSON list of tool descriptions, from a list or its JSON text; ``None`` for an empty list or text.

    Raises:
        ExampleError: where ``value`` is no list of objects.
    """
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise malformed(f"{where}: expected tools as JSON, found {found(value)}") from None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise malformed(f"{where}: expected a list of tool objects, found {found(value)}")
    return _dump(value, where) if value else None


_NEXT = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant"),
}


def check_prompt(messages: Sequence[Message]) -> None:
    """Check that a prompt is ``[system] user (assistant user)*``, with tool calls between, and that no turn is empty.

    Raises:
        ExampleError: naming the turn (counted from 1).
    """
    state = _last_state(messages)
    if state not in ("user", "tool"):
        last = "nothing" if state == "start" else f"{with_article(messages[-1].role)} turn"
        raise malformed(f"the prompt must end with a user turn, it ends with {last}")


def check_answer(name: str, prompt: Sequence[Message], answer: Sequence[Message]) -> None:
    """Check that the turns of an answer follow the prompt in order, and that none of the assistant's is empty.

    Args:
        name: ``chosen`` or ``rejected``.
        prompt: Checked already.
        answer: Assistant turns, with tool turns between.

    Raises:
        ExampleError: naming the turn.
    """
    for message in answer:
        if message.role == "assistant" and not message.content.strip() and message.tool_calls is None:
            raise ExampleError("empty", f"{name}: the response has no text")
    try:
        _last_state([*prompt, *answer])
    except ExampleError as error:
        raise ExampleError(error.kind, f"{name}: {error.message}") from None


def _last_state(messages: Sequence[Message]) -> str:
    """The key of ``_NEXT`` after all messages; raises at the first message that is out of order or empty."""
    state = "start"
    for number, message in enumerate(messages, start=1):
        if message.role not in _NEXT[state]:
            before = "at the start" if state == "start" else f"after turn {number - 1} ({messages[number - 2].role})"
            raise malformed(
                f"turn {number} is {with_article(message.role)} turn {before}; expected {' or '.join(_NEXT[state])}: "
                "turns alternate, and a system turn comes first"
            )
        bare = not message.content.strip() and not message.images and message.tool_calls is None
        if message.role in ("user", "assistant") and bare:
            raise ExampleError("empty", f"turn {number} ({message.role}) of the prompt has no text")
        state = "call" if message.tool_calls is not None else message.role
    return state


def whole_conversation(name: str, prompt: list[Message] | None, turns: list[Message]) -> list[Message]:
    """The conversation of prompt and answer; ``turns`` is the answer, or that conversation already."""
    if turns[-1].role != "assistant":
        raise malformed(f"{name}: the last turn must be an assistant turn, found {with_article(turns[-1].role)} turn")
    if prompt is None or (len(turns) > len(prompt) and turns[: len(prompt)] == prompt):
        return turns
    return [*prompt, *turns]


def shared_turns(chosen: list[Message], rejected: list[Message]) -> int:
    """Number of turns before the answers: those that both have, up to an assistant turn of both."""
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    while common and not chosen[common].role == rejected[common].role == "assistant":
        common -= 1
    return common
