"""Conversations to token ids: separate tokenisation of prompt and response, and truncation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from mindspeed_simpo.batch import TokenizedPair
from mindspeed_simpo.data.conversations import ConversationPair
from mindspeed_simpo.data.images import StoredImage, store
from mindspeed_simpo.data.problems import ExampleError, ProblemKind, malformed
from mindspeed_simpo.data.processor import ImageProcessor
from mindspeed_simpo.data.template import ChatFormat, Segment, TemplateSettings
from mindspeed_simpo.errors import ModelError

_ANCHOR = "\n"
LONGEST_TEXT = 4_000_000
"""Characters of a turn beyond which it is not tokenised; a text without spaces takes a second for each million."""


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one pair, cut to the sequence length."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_unscored: list[int]
    """See :class:`~mindspeed_simpo.batch.TokenizedPair`."""
    rejected_unscored: list[int]
    prompt_cut: int = 0
    """Tokens cut from the prompt."""
    chosen_cut: int = 0
    """Tokens cut from the end of the chosen response, its end of turn included."""
    rejected_cut: int = 0
    """Tokens cut from the end of the rejected response, its end of turn included."""
    images: tuple[StoredImage, ...] = ()
    """Of the prompt, in the order of their places."""


@dataclass(frozen=True)
class Problem:
    """Why an example cannot be used."""

    kind: ProblemKind
    message: str


@dataclass(frozen=True)
class PlacedResult:
    """An example and its place, after encoding."""

    source: int
    """Index of its source."""
    number: int
    """Its number in that source, see :data:`~mindspeed_simpo.data.source.Example`."""
    value: EncodedPair | Problem


class PairEncoder:
    """Render and tokenise pairs, and cut those that are too long where ``truncation`` asks for it.

    ``prompt_ids`` is the prompt with the generation prompt, ``chosen_ids`` and ``rejected_ids`` are what follows the
    prompt, up to and including one end-of-turn token. Prompt and response are tokenised separately, as at generation,
    and no special token is added beyond those that the template renders.

    Truncation of a pair longer than ``seq_length`` (``keep_end``, ``keep_start``: which end of the prompt stays): the
    prompt is cut as far as needed for the longer response, but not below ``prompt_limit``; the text that closes the
    last turn, the assistant header and a BOS at the start are never cut; without the BOS many models degrade. Chosen
    and rejected share the cut prompt. A response that is then still too long loses its tail, with its end of turn,
    never its first token. A prompt with images is never cut.

    Args:
        tokenizer: With a chat template.
        seq_length: Longest sequence, tokens.
        prompt_limit: Length below which truncation does not cut the prompt, tokens.
        truncation: ``error`` and ``drop`` both raise for a pair that is too long; the caller tells them apart.
        vocab_size: Rows of the model's embedding, beyond which no token id may lie; ``None`` checks nothing.
        template: Variables and date for the chat template.
        images: Processor of a model that takes images: prompts with images are tokenised by it.

    Raises:
        ConfigError: where the chat template does not read one of the variables.
        ModelError: where the chat template cannot serve, or the model has no embedding of its end of turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seq_length: int,
        prompt_limit: int,
        truncation: Literal["error", "drop", "keep_end", "keep_start"],
        vocab_size: int | None = None,
        template: TemplateSettings | None = None,
        images: ImageProcessor | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._images = images
        self._format = ChatFormat(tokenizer, template, images=images is not None)
        self._seq_length = seq_length
        self._prompt_limit = prompt_limit
        self._truncation = truncation
        self._vocab_size = vocab_size
        self._anchor_ids = self._find_anchor()
        if vocab_size is not None and self._format.end_of_turn_id >= vocab_size:
            raise ModelError(f"the end of turn: {self._outside(self._format.end_of_turn_id, vocab_size)}")

    def encode(self, pair: ConversationPair | TokenizedPair) -> EncodedPair:
        """Encode one pair; a tokenised pair is only checked and, where truncation asks for it, cut.

        Raises:
            ExampleError: of kind ``unreadable`` for an image that is missing or damaged.
            ExampleError: for a token id that the model's vocabulary does not have; as :meth:`ChatFormat.render`; of
                kind ``too_long`` where truncation is ``error`` or ``drop``; of kind ``identical`` where chosen and
                rejected are the same tokens.
        """
        if isinstance(pair, TokenizedPair):
            return self._encode_tokenised(pair)
        for message in (*pair.prompt, *pair.chosen, *pair.rejected):
            if len(message.content) > LONGEST_TEXT:
                raise ExampleError(
                    "too_long",
                    f"a turn has {len(message.content)} characters; more than {LONGEST_TEXT} are not tokenised",
                )
        text = self._format.render(pair)
        anchor = _ANCHOR if self._anchor_ids else ""
        # one call for all texts: the tokenizer's own work is the smaller part of a call
        segments = (*text.chosen, *text.rejected)
        prompt_ids, *anchored = self._ids(text.prompt, *(anchor + segment.text for segment in segments))
        images = [store(reference, pair.folder) for reference in pair.images]
        if images:
            assert self._images is not None, "the reader refuses images where the model takes none"
            prompt_ids = self._images.prompt_ids(text.prompt, [image for _, image in images])
        chosen = self._answer_ids("chosen", text.chosen, anchored[: len(text.chosen)])
        rejected = self._answer_ids("rejected", text.rejected, anchored[len(text.chosen) :])
        stored = tuple(image for image, _ in images)
        encoded = EncodedPair(prompt_ids, chosen[0], rejected[0], chosen[1], rejected[1], images=stored)
        return self._truncate_if_long(encoded, text.before_header)

    def _encode_tokenised(self, pair: TokenizedPair) -> EncodedPair:
        highest = max((*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids))
        if highest >= len(self._tokenizer):
            raise malformed(f"id {highest} is not one of the tokenizer's {len(self._tokenizer)}: tokenised by another")
        if self._images is not None and self._images.token_id in (
            *pair.prompt_ids,
            *pair.chosen_ids,
            *pair.rejected_ids,
        ):
            raise malformed("a tokenised row has tokens of images, and no images: give the rows as text")
        unscored = list(pair.chosen_unscored), list(pair.rejected_unscored)
        encoded = EncodedPair(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, *unscored)
        return self._truncate_if_long(encoded, None)

    def _truncate_if_long(self, encoded: EncodedPair, before_header: str | None) -> EncodedPair:
        if self._vocab_size is not None:
            highest = max((*encoded.prompt_ids, *encoded.chosen_ids, *encoded.rejected_ids))
            if highest >= self._vocab_size:
                raise malformed(self._outside(highest, self._vocab_size))
        if encoded.chosen_ids == encoded.rejected_ids:
            raise ExampleError("identical", "chosen and rejected are the same tokens")
        longest = len(encoded.prompt_ids) + max(len(encoded.chosen_ids), len(encoded.rejected_ids))
        return encoded if longest <= self._seq_length else self._cut(encoded, before_header)

    def _outside(self, token_id: int, vocab_size: int) -> str:
        return (
            f"token {self._tokenizer.convert_ids_to_tokens(token_id)!r} has the id {token_id}, beyond the model's "
            f"vocab_size {vocab_size} (config.json): use the tokenizer of this model, or a model whose embedding was "
            "resized for the added tokens"
        )

    def _cut(self, pair: EncodedPair, before_header: str | None) -> EncodedPair:
        prompt, chosen, rejected = pair.prompt_ids, pair.chosen_ids, pair.rejected_ids
        lengths = f"prompt {len(prompt)} tokens, chosen {len(chosen)}, rejected {len(rejected)}"
        longest = len(prompt) + max(len(chosen), len(rejected))
        if self._truncation in ("error", "drop"):
            raise ExampleError("too_long", f"{longest} tokens ({lengths}), seq_length is {self._seq_length}")
        room = self._seq_length - max(len(chosen), len(rejected))
        keep = min(len(prompt), max(room, self._prompt_limit))
        head, header = (0, len(prompt)) if pair.images else self._uncut_lengths(prompt, before_header)
        keep = max(keep, head + header)
        if keep >= self._seq_length:
            raise ExampleError(
                "too_long",
                f"{longest} tokens ({lengths}): {'a prompt with images is not cut, and' if pair.images else 'the'} "
                f"{'this one' if pair.images else 'assistant header alone'} has {head + header}, "
                f"so that seq_length {self._seq_length} leaves no room for the response",
            )
        cut_prompt = self._cut_prompt(prompt, keep, head, header)
        room = self._seq_length - len(cut_prompt)
        if chosen[:room] == rejected[:room]:
            raise ExampleError(
                "identical", f"chosen and rejected are the same in the {room} tokens that truncation leaves"
            )
        return EncodedPair(
            cut_prompt,
            chosen[:room],
            rejected[:room],
            self._cut_ranges("chosen", pair.chosen_unscored, room),
            self._cut_ranges("rejected", pair.rejected_unscored, room),
            prompt_cut=len(prompt) - len(cut_prompt),
            chosen_cut=max(0, len(chosen) - room),
            rejected_cut=max(0, len(rejected) - room),
            images=pair.images,
        )

    def _cut_ranges(self, name: str, unscored: list[int], room: int) -> list[int]:
        """The ranges within the first ``room`` tokens of an answer."""
        if unscored and unscored[0] == 0 and unscored[1] >= room:
            raise ExampleError("too_long", f"{name}: none of the {room} tokens that seq_length leaves is scored")
        ranges = zip(unscored[::2], unscored[1::2], strict=True)
        return [bound for start, stop in ranges if start < room for bound in (start, min(stop, room))]

    def _cut_prompt(self, prompt: list[int], keep: int, head: int, header: int) -> list[int]:
        if self._truncation == "keep_end":
            return prompt[:head] + prompt[len(prompt) - (keep - head) :]
        return prompt[: keep - header] + prompt[len(prompt) - header :]

    def _uncut_lengths(self, prompt: list[int], before_header: str | None) -> tuple[int, int]:
        """Tokens at the start (BOS) and at the end (assistant header) of the prompt that no truncation cuts."""
        head = int(bool(prompt) and prompt[0] == self._tokenizer.bos_token_id)
        if before_header is None:  # a tokenised pair: the start of its assistant header is unknown
            return head, 0
        [before] = self._ids(before_header)
        common = 0
        while common < min(len(before), len(prompt)) and before[common] == prompt[common]:
            common += 1
        return head, len(prompt) - max(common, head)

    def _answer_ids(
        self, name: str, segments: Sequence[Segment], anchored: Sequence[list[int]]
    ) -> tuple[list[int], list[int]]:
        """Ids of an answer, and the bounds of the ranges that are not scored.

        Args:
            name: ``chosen`` or ``rejected``.
            segments: Of the answer.
            anchored: Of each segment, the ids of the anchor and the segment's text together.
        """
        anchor, end = self._anchor_ids, self._format.end_of_turn_id
        answer: list[int] = []
        unscored: list[int] = []
        for segment, with_anchor in zip(segments, anchored, strict=True):
            separable = with_anchor[: len(anchor)] == anchor
            ids = with_anchor[len(anchor) :] if separable else self._ids(segment.text)[0]
            if not segment.scored:
                unscored += [len(answer), len(answer) + len(ids)]
                answer += ids
                continue
            if not ids:
                raise ExampleError("empty", f"{name}: the response has no token")
            if end in ids:
                raise malformed(f"{name}: the end-of-turn token appears within the response")
            answer += [*ids, end]
        return answer, unscored

    def _ids(self, *texts: str) -> list[list[int]]:
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, padding=False, truncation=False, verbose=False,
            return_attention_mask=False, return_token_type_ids=False,
        )  # fmt: skip
        return [list(ids) for ids in encoded["input_ids"]]

    def _find_anchor(self) -> list[int]:
        """Ids of a newline for tokenizers that put a space before every text, such as Llama-2's, else an empty list.

        A response follows a prompt: a model never generates that space, so that it must not be a target.
        """
        anchor, anchored, bare = self._ids(_ANCHOR, _ANCHOR + "a", "a")
        separable = anchored[: len(anchor)] == anchor
        return anchor if separable and anchored[len(anchor) :] != bare else []
