"""The token that ends an assistant turn, found in what a chat template renders."""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mindspeed_simpo.errors import ModelError


@dataclass(frozen=True)
class EndOfTurn:
    """The token that a model generates at the end of its turn."""

    id: int
    rendered: str | None
    """Its text where the template renders it after the last turn of a conversation, else ``None``."""


def find_end_of_turn(tokenizer: PreTrainedTokenizerBase, last: str, inner: str, header: str) -> EndOfTurn:
    """Find the end of turn.

    It is the first special token after the last turn, or the last of several special tokens that stand there in a row
    and also end a turn within a conversation (Cohere's). Where there is none, it is the special token with which a
    user turn begins at once, if only user turns begin so (GLM's ``<|user|>``: the model stops by generating it), else
    the tokenizer's ``eos_token``.

    Args:
        tokenizer: With a chat template.
        last: What the template renders after the last assistant turn of a conversation.
        inner: What it renders between an assistant turn and the text of the user turn that follows.
        header: What it renders between the text of a user turn and the assistant turn that follows.

    Raises:
        ModelError: where there is none at all.
    """
    special = special_tokens(tokenizer)
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    text = _first(special, last) or _first(added, last)
    if text is not None:
        text = _last_of_run(special, text, last, inner)
        return EndOfTurn(_id(tokenizer, text), text)
    opening = any_of(special - {str(tokenizer.bos_token)}).match(inner)
    if opening is not None and opening.group() not in header:
        return EndOfTurn(_id(tokenizer, opening.group()), None)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "no end-of-turn token: the chat template renders no special token after an assistant turn, "
            "and the tokenizer has no eos_token; use a chat_template that ends assistant turns with one"
        )
    return EndOfTurn(int(tokenizer.eos_token_id), None)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The texts of all special tokens."""
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}


def any_of(texts: set[str]) -> re.Pattern[str]:
    """A pattern that matches any of the texts, the longest one where several match; nothing where there is none."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts - {""}, key=len, reverse=True)) or "(?!)")


def _first(texts: set[str], within: str) -> str | None:
    match = any_of(texts).search(within)
    return match.group() if match else None


def _last_of_run(special: set[str], first: str, last: str, inner: str) -> str:
    if first not in inner:
        return first
    rest, rest_inner = last.split(first, 1)[1], inner.split(first, 1)[1]
    found = first
    while (match := any_of(special).match(rest)) is not None and rest_inner.startswith(match.group()):
        found = match.group()
        rest, rest_inner = rest[len(found) :], rest_inner[len(found) :]
    return found


def _id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    found = tokenizer.convert_tokens_to_ids(text)
    return int(found)  # type: ignore[arg-type]
