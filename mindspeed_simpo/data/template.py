"""Conversations to text, by the tokenizer's chat template: prompt, responses and the end-of-turn token."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from mindspeed_simpo.config.options import DEFAULT_TEMPLATE_DATE, DataOptions
from mindspeed_simpo.data.conversations import ConversationPair
from mindspeed_simpo.data.end_of_turn import any_of, find_end_of_turn, special_tokens
from mindspeed_simpo.data.fidelity import check_prompt_kept, check_response_kept, check_system_in_place
from mindspeed_simpo.data.frozen_date import with_frozen_date
from mindspeed_simpo.data.problems import ExampleError, malformed
from mindspeed_simpo.data.time_limit import TEMPLATE_SECONDS, time_limit
from mindspeed_simpo.data.turns import REASONING_KEYS, Message
from mindspeed_simpo.errors import ConfigError, ModelError

_QUESTION = "WhatIsTwoAndTwo"
_ANSWER = "FourItIs"
_THANKS = "ManyThanks"
_EMPTY_THOUGHT = re.compile(r"\s*<(\w*:?think\w*)>\s*</\1>\n*")


@dataclass(frozen=True)
class TemplateSettings:
    """What a chat template is given beside messages and tools."""

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables, ``chat_template_kwargs``."""
    date: str = DEFAULT_TEMPLATE_DATE
    """The day, ``YYYY-MM-DD``, that a template which prints today's date takes it to be."""

    @classmethod
    def of(cls, options: DataOptions) -> TemplateSettings:
        """The settings that the options ask for."""
        return cls(options.chat_template_kwargs or {}, options.chat_template_date)


@dataclass(frozen=True)
class Segment:
    """A part of an answer as text."""

    text: str
    """An assistant turn, or what stands before it: tool turns with their headers, an empty thought."""
    scored: bool
    """Whether it is an assistant turn; ``text`` then lacks its end-of-turn token."""


@dataclass(frozen=True)
class RenderedPair:
    """A pair as text."""

    prompt: str
    chosen: tuple[Segment, ...]
    """In order; the last one is scored."""
    rejected: tuple[Segment, ...]
    before_header: str
    """The part of ``prompt`` that truncation may cut; the assistant header is the rest."""


class ChatFormat:
    """Render pairs with the tokenizer's chat template, and find the token that ends a response.

    The end-of-turn token is what the template renders after an assistant turn (such as ``<|im_end|>``, ``<|eot_id|>``,
    ``</s>``), see :func:`~mindspeed_simpo.data.end_of_turn.find_end_of_turn`. What the template renders after it
    (ChatML's newline) is no part of the response.

    An empty thought that the template puts before a response (Qwen3's ``<think>``, ``</think>``) is not scored: the
    model is given it, and does not generate it, where it answers without thinking. Where both answers begin with it, it
    belongs to the prompt. Of an answer of several turns only the assistant's are scored, each with its end of turn.

    Args:
        tokenizer: With a chat template.
        settings: Variables and date for the template.
        images: Whether the template is that of a model that takes images.

    Raises:
        ModelError: where the template renders no assistant turn or a double BOS, or there is no end-of-turn token.
        ConfigError: where the template does not read one of the variables.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: TemplateSettings | None = None, *, images: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self._settings = settings or TemplateSettings()
        self._source = json.dumps(tokenizer.chat_template)
        self._takes_tools = self._reads("tools")
        self._reasoning_key = next((key for key in REASONING_KEYS if self._reads(key)), None)
        self._check_kwargs()
        question, answer, thanks = (
            Message("user", _QUESTION),
            Message("assistant", _ANSWER),
            Message("user", _THANKS),
        )
        self._as_parts = False
        try:
            with time_limit(TEMPLATE_SECONDS):
                self._as_parts = images and self._wants_parts([question, answer, thanks])
                prompt = self._render([question], None, header=True)
                whole = self._render([question, answer], None, header=False)
                longer = self._render([question, answer, thanks], None, header=False)
        except (ExampleError, TimeoutError) as error:
            raise ModelError(str(error)) from None
        if _QUESTION not in prompt or _ANSWER not in whole:
            raise ModelError("the chat template leaves out the user or the assistant turn of a conversation")
        self._check_bos(prompt)
        self._closing = prompt[prompt.rindex(_QUESTION) + len(_QUESTION) :]
        self._tail = whole[whole.rindex(_ANSWER) + len(_ANSWER) :]
        self._lead = whole[len(prompt) : whole.rindex(_ANSWER)] if whole.startswith(prompt) else ""
        self._gives_empty_thought = _EMPTY_THOUGHT.fullmatch(self._lead) is not None
        inner = longer.rpartition(_ANSWER)[2].partition(_THANKS)[0]
        self._end = find_end_of_turn(tokenizer, self._tail, inner, self._closing)
        self.end_of_turn_id = self._end.id
        self._special = any_of(special_tokens(tokenizer) | {self._end.rendered or ""})

    def notes(self) -> list[str]:
        """What the template does of itself, for a report."""
        notes = [f"the chat template is given {name} = {value!r}" for name, value in self._settings.kwargs.items()]
        if self._reads("strftime_now"):
            notes.append(f"the chat template prints the date, which is always {self._settings.date}")
        if self._gives_empty_thought:
            notes.append(f"the chat template begins responses with {self._lead!r}: part of the prompt, not scored")
        elif self._lead.strip():
            notes.append(f"the chat template begins responses with {self._lead!r}, which is scored")
        return notes

    def render(self, pair: ConversationPair) -> RenderedPair:
        """Render the prompt with the generation prompt and both whole conversations without.

        Raises:
            ExampleError: where the template refuses, changes or leaves out a turn, where a text contains a special
                token (which would be tokenised as such), or where the rendered prompt is no prefix of the rendered
                conversation.
        """
        try:
            with time_limit(TEMPLATE_SECONDS):
                return self._rendered(pair)
        except TimeoutError as error:
            raise malformed(str(error)) from None

    def _rendered(self, pair: ConversationPair) -> RenderedPair:
        self._check_texts(pair)
        tools = json.loads(pair.tools) if pair.tools is not None else None
        if tools and not self._takes_tools:
            raise malformed("the row has tools, which the chat template does not take")
        prompt = self._render(pair.prompt, tools, header=True)
        check_prompt_kept(pair.prompt, prompt)
        before_header = self._before_header(pair.prompt, tools, prompt)
        chosen = self._segments("chosen", pair.prompt, pair.chosen, tools, prompt)
        rejected = self._segments("rejected", pair.prompt, pair.rejected, tools, prompt)
        thought = _common_empty_thought(chosen[0].text, rejected[0].text)
        answers = []
        for first, *rest in (chosen, rejected):
            segments = [Segment(first.text[len(thought) :], scored=True), *rest]
            answers.append(tuple(_without_thoughts(segments) if self._gives_empty_thought else segments))
        return RenderedPair(prompt + thought, answers[0], answers[1], before_header)

    def _segments(
        self, name: str, prompt: Sequence[Message], answer: Sequence[Message], tools: Any, rendered: str
    ) -> list[Segment]:
        """The assistant turns of an answer, and between them what the template renders from one to the next.

        The next turn begins where the generation prompt of all turns before it ends, as at generation.
        """
        whole = self._render([*prompt, *answer], tools, header=False)
        check_system_in_place(name, prompt, rendered, whole)
        if self._end.rendered is None and any(turn.tool_calls is not None for turn in answer):
            raise malformed(f"{name}: the chat template does not render the token that ends a call")
        found: list[Segment] = []
        before = rendered
        for number, turn in enumerate(answer):
            if turn.role != "assistant":
                continue
            if found:
                end = len(before) + len(found[-1].text) + len(self._end.rendered or "")
                before = self._render([*prompt, *answer[:number]], tools, header=True)
                if len(before) < end:
                    raise malformed(f"{name}: the chat template leaves out an assistant turn of the answer")
                self._check_prefix(name, before, whole)
                tool_turns = [turn for turn in answer[:number] if turn.role == "tool"]
                check_prompt_kept(tool_turns, before[len(rendered) :])
                found.append(Segment(before[end:], scored=False))
            response = self._response(name, before, whole)
            check_response_kept(name, turn, response)
            found.append(Segment(response, scored=True))
        return found

    def _render(self, messages: Sequence[Message], tools: Any, *, header: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [message.for_template(self._reasoning_key, as_parts=self._as_parts) for message in messages],
                tools=tools,
                chat_template=with_frozen_date(self.tokenizer.get_chat_template(tools=tools), self._settings.date),
                tokenize=False,
                add_generation_prompt=header,
                **self._settings.kwargs,
            )
        except TimeoutError:
            raise
        except Exception as error:
            # A template is a program: it raises on purpose, or with any error on messages that it was not written for.
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise malformed(f"the chat template refuses the conversation: {reason}") from None
        return str(text)

    def _wants_parts(self, turns: Sequence[Message]) -> bool:
        """Whether turns without images have to be lists of parts too, which some templates of such models read only."""
        rendered = {}
        for as_parts in (False, True):
            self._as_parts = as_parts
            try:
                rendered[as_parts] = self._render(turns, None, header=False)
            except ExampleError:
                rendered[as_parts] = ""
        return all(turn.content in rendered[True] for turn in turns) and rendered[True] != rendered[False]

    def _check_prefix(self, name: str, prompt: str, whole: str) -> None:
        if not whole.startswith(prompt):
            common = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
            raise ExampleError(
                "not_prefix",
                f"{name}: the rendered prompt is not a prefix of the rendered conversation: after "
                f"{prompt[max(0, common - 20) : common]!r} the prompt has {prompt[common : common + 20]!r}, "
                f"the conversation {whole[common : common + 20]!r}; {_advice(prompt[common:])}",
            )

    def _response(self, name: str, prompt: str, whole: str) -> str:
        """The text of the assistant turn that follows ``prompt``."""
        self._check_prefix(name, prompt, whole)
        response = whole[len(prompt) :]
        if self._end.rendered is None:
            response = response.removesuffix(self._tail)
        else:
            response, mark, _ = response.partition(self._end.rendered)
            if not mark:
                raise malformed(f"{name}: the chat template renders no {self._end.rendered} after the response")
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
        named += [("chosen", turn) for turn in pair.chosen] + [("rejected", turn) for turn in pair.rejected]
        for where, message in named:
            texts += [(where, text) for text in (message.content, message.tool_calls or "", *message.extras.values())]
        for where, text in texts:
            match = self._special.search(text)
            if match is not None:
                raise malformed(f"{where}: contains the special token {match.group()!r} as text; remove or escape it")

    def _check_bos(self, prompt: str) -> None:
        bos = self.tokenizer.bos_token
        if bos and prompt.startswith(bos + bos):
            raise ModelError(f"the chat template renders {bos} twice at the start; use a chat_template with one")

    def _check_kwargs(self) -> None:
        taken = {*inspect.signature(self.tokenizer.apply_chat_template).parameters, "messages", "strftime_now"}
        for name in self._settings.kwargs:
            if name in taken:
                raise ConfigError(f"chat_template_kwargs: `{name}` is set by this program and cannot be given")
            if not self._reads(name):
                raise ConfigError(f"chat_template_kwargs: the chat template does not read `{name}`")

    def _reads(self, name: str) -> bool:
        return re.search(rf"\b{re.escape(name)}\b", self._source) is not None


def _common_empty_thought(chosen: str, rejected: str) -> str:
    thoughts = [match.group() for match in map(_EMPTY_THOUGHT.match, (chosen, rejected)) if match is not None]
    shorter = min(thoughts, key=len, default="")
    return shorter if len(thoughts) == 2 and all(text.startswith(shorter) for text in (chosen, rejected)) else ""


def _without_thoughts(segments: Sequence[Segment]) -> Iterator[Segment]:
    """The segments, with the empty thoughts at the start of assistant turns as segments that are not scored."""
    for segment in segments:
        thought = _EMPTY_THOUGHT.match(segment.text) if segment.scored else None
        if thought is not None:
            yield Segment(thought.group(), scored=False)
            segment = Segment(segment.text[thought.end() :], scored=True)
        yield segment


def _advice(rest_of_prompt: str) -> str:
    if "think" in rest_of_prompt:
        return (
            "the generation prompt opens a thought that the conversation has not: set chat_template_kwargs where the "
            "template can answer without thinking, else use a chat_template that keeps the reasoning of responses"
        )
    return "use a chat_template that keeps them alike"
