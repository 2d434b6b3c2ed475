"""Conversations to text, by the tokenizer's chat template: prompt, responses and the end-of-turn token."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from mindspeed_simpo.data.conversations import ConversationPair
from mindspeed_simpo.data.problems import ExampleError, malformed
from mindspeed_simpo.data.turns import Message
from mindspeed_simpo.errors import ModelError

_QUESTION = "WhatIsTwoAndTwo"
_ANSWER = "FourItIs"


@dataclass(frozen=True)
class RenderedPair:
    """A pair as text; the responses do not contain their end-of-turn token."""

    prompt: str
    chosen: str
    rejected: str
    before_header: str
    """The part of ``prompt`` that truncation may cut; the assistant header is the rest."""


class ChatFormat:
    """Render pairs with the tokenizer's chat template, and find the token that ends a response.

    The end-of-turn token is the first special token that the template renders after an assistant turn (such as
    ``<|im_end|>``, ``<|eot_id|>``, ``</s>``); it need not be ``tokenizer.eos_token``. What the template renders after
    it (ChatML's newline) is no part of the response. Where the template renders none, it is ``tokenizer.eos_token``.

    Raises:
        ModelError: where the template renders no assistant turn or a double BOS, or there is no end-of-turn token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._takes_tools = re.search(r"\btools\b", json.dumps(tokenizer.chat_template)) is not None
        question, answer = Message("user", _QUESTION), Message("assistant", _ANSWER)
        try:
            prompt = self._render([question], None, header=True)
            whole = self._render([question, answer], None, header=False)
        except ExampleError as error:
            raise ModelError(error.message) from None
        if _QUESTION not in prompt or _ANSWER not in whole:
            raise ModelError("the chat template leaves out the user or the assistant turn of a conversation")
        self._check_bos(prompt)
        self._closing = prompt[prompt.rindex(_QUESTION) + len(_QUESTION) :]
        self._tail = whole[whole.rindex(_ANSWER) + len(_ANSWER) :]
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        self._end_of_turn = _first(special, self._tail) or _first({str(token) for token in added}, self._tail)
        self.end_of_turn_id = self._find_end_of_turn_id()
        self._special = _any_of(special | {self._end_of_turn or ""})

    def render(self, pair: ConversationPair) -> RenderedPair:
        """Render the prompt with the generation prompt and both whole conversations without.

        Raises:
            ExampleError: where the template refuses or leaves out a turn, where a text contains a special token (which
                would be tokenised as such), or where the rendered prompt is no prefix of the rendered conversation.
        """
        self._check_texts(pair)
        tools = json.loads(pair.tools) if pair.tools is not None else None
        if tools and not self._takes_tools:
            raise malformed("the row has tools, which the chat template does not take")
        prompt = self._render(pair.prompt, tools, header=True)
        for message in pair.prompt:
            if message.role in ("system", "user") and message.content.strip() not in prompt:
                raise malformed(f"the chat template leaves out the {message.role} turn")
        chosen, rejected = (
            self._response(name, prompt, self._render([*pair.prompt, answer], tools, header=False))
            for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected))
        )
        return RenderedPair(prompt, chosen, rejected, self._before_header(pair.prompt, tools, prompt))

    def _render(self, messages: Sequence[Message], tools: Any, *, header: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [message.for_template() for message in messages],
                tools=tools,
                tokenize=False,
                add_generation_prompt=header,
            )
        except Exception as error:
            # A template is a program: it raises on purpose, or with any error on messages that it was not written for.
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise malformed(f"the chat template refuses the conversation: {reason}") from None
        return str(text)

    def _response(self, name: str, prompt: str, whole: str) -> str:
        if not whole.startswith(prompt):
            common = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
            raise ExampleError(
                "not_prefix",
                f"{name}: the rendered prompt is not a prefix of the rendered conversation: after "
                f"{prompt[max(0, common - 20) : common]!r} the prompt has {prompt[common : common + 20]!r}, "
                f"the conversation {whole[common : common + 20]!r}; use a chat_template that keeps them alike",
            )
        response = whole[len(prompt) :]
        if self._end_of_turn is None:
            response = response.removesuffix(self._tail)
        else:
            response, mark, _ = response.partition(self._end_of_turn)
            if not mark:
                raise malformed(f"{name}: the chat template renders no {self._end_of_turn} after the response")
        if not response.strip():
            raise ExampleError("empty", f"{name}: the chat template renders no text for the response")
        return response

    def _before_header(self, messages: Sequence[Message], tools: Any, prompt: str) -> str:
        if self._closing and prompt.endswith(self._closing):
            return prompt[: -len(self._closing)]
        bare = self._render(messages, tools, header=False)
        return bare if prompt.startswith(bare) else prompt

    def _check_texts(self, pair: ConversationPair) -> None:
        named = [(f"turn {number} ({turn.role})", turn) for number, turn in enumerate(pair.prompt, start=1)]
        texts = [("tools", pair.tools or "")]
        for where, message in (*named, ("chosen", pair.chosen), ("rejected", pair.rejected)):
            texts += [(where, text) for text in (message.content, message.tool_calls or "", *message.extras.values())]
        for where, text in texts:
            match = self._special.search(text)
            if match is not None:
                raise malformed(f"{where}: contains the special token {match.group()!r} as text; remove or escape it")

    def _find_end_of_turn_id(self) -> int:
        if self._end_of_turn is not None:
            ids: Any = self.tokenizer.convert_tokens_to_ids(self._end_of_turn)
            return int(ids)
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                "no end-of-turn token: the chat template renders no special token after an assistant turn, "
                "and the tokenizer has no eos_token; use a chat_template that ends assistant turns with one"
            )
        return int(self.tokenizer.eos_token_id)

    def _check_bos(self, prompt: str) -> None:
        bos = self.tokenizer.bos_token
        if bos and prompt.startswith(bos + bos):
            raise ModelError(f"the chat template renders {bos} twice at the start; use a chat_template with one")


def _any_of(texts: set[str]) -> re.Pattern[str]:
    # Longest first: where one token is a prefix of another, the longer one must match.
    return re.compile("|".join(re.escape(text) for text in sorted(texts - {""}, key=len, reverse=True)) or "(?!)")


def _first(texts: set[str], within: str) -> str | None:
    match = _any_of(texts).search(within)
    return match.group() if match else None
