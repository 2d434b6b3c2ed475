"""The prompts of a sampling run: rows of data files, rendered and tokenised by the code that training uses."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from mindspeed_simpo.batch import TokenizedPair
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.data.conversations import ConversationPair
from mindspeed_simpo.data.encoding import EncodedPair, PairEncoder
from mindspeed_simpo.data.paths import open_sources
from mindspeed_simpo.data.problems import ExampleError, malformed
from mindspeed_simpo.data.processor import ImageProcessor
from mindspeed_simpo.data.prompts import Prompt, PromptReader
from mindspeed_simpo.data.template import ChatFormat, TemplateSettings
from mindspeed_simpo.data.turns import Message
from mindspeed_simpo.errors import DataError
from mindspeed_simpo.studies.sampling.record import SamplingPrompt
from mindspeed_simpo.studies.sampling.settings import SamplingSettings

logger = logging.getLogger(__name__)

_LISTED = 10
_STAND_INS = ("Yes", "No")
"""Answers in the place of those that are not there yet; the rendered prompt does not depend on them."""


class Rendering:
    """Conversations to text and token ids as training makes them, under the configuration of the training.

    Args:
        config: Template variables and date, ``seq_length``.
        tokenizer: Of the model.
        images: Processor of a model that takes images.
    """

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, images: ImageProcessor | None = None
    ) -> None:
        template = TemplateSettings.of(config)
        self.takes_images = images is not None
        """Whether the model takes images, in rows with prompts of text alone."""
        self._format = ChatFormat(tokenizer, template, images=self.takes_images)
        self._encoder = PairEncoder(
            tokenizer,
            seq_length=config.seq_length,
            prompt_limit=config.prompt_limit,
            truncation="error",
            template=template,
            images=images,
        )
        self._seq_length = config.seq_length
        self.end_of_turn_id = self._format.end_of_turn_id

    def prompt(self, prompt: Prompt) -> tuple[str, list[int], int]:
        """Text and token ids of a prompt with its generation prompt, and the tokens that it leaves for an answer.

        Raises:
            ExampleError: as in training; of kind ``too_long`` where the prompt leaves no room.
        """
        pair = self._pair(prompt, *_STAND_INS)
        ids = self._encoder.encode(pair).prompt_ids
        return self._format.render(pair).prompt, ids, self._seq_length - len(ids) - 1

    def answer_tokens(self, prompt: Prompt, text: str) -> int:
        """Tokens of an answer in training, its end of turn included.

        Raises:
            ExampleError: where training would refuse the answer.
        """
        other = next(stand_in for stand_in in _STAND_INS if stand_in != text.strip())
        return len(self._encoder.encode(self._pair(prompt, text, other)).chosen_ids)

    def pair(self, pair: ConversationPair) -> EncodedPair:
        """A pair as training would have it.

        Raises:
            ExampleError: where training would refuse the pair.
        """
        return self._encoder.encode(pair)

    @staticmethod
    def _pair(prompt: Prompt, chosen: str, rejected: str) -> ConversationPair:
        better, worse = Message("assistant", chosen), Message("assistant", rejected)
        return ConversationPair(prompt.messages, (better,), (worse,), prompt.tools)


@dataclass(frozen=True)
class PromptSet:
    """The prompts that are sampled, and what was left out."""

    prompts: list[SamplingPrompt]
    rows: int
    duplicates: int
    """Rows whose prompt an earlier row has."""
    too_long: int
    """Rows whose prompt leaves no room for an answer."""
    unusable: int
    """Rows without a prompt that can be used."""

    @property
    def digest(self) -> str:
        """Hex digest of what answers depend on."""
        return _digest([prompt.index, list(prompt.ids), prompt.limit] for prompt in self.prompts)

    @property
    def columns_digest(self) -> str:
        """Hex digest of the columns that the scorer's program is given."""
        return _digest(prompt.columns for prompt in self.prompts)


def _digest(facts: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for each in facts:
        digest.update(json.dumps(each, default=str).encode())
    return digest.hexdigest()


def read_prompts(config: Config, settings: SamplingSettings, rendering: Rendering) -> PromptSet:
    """Read, render and tokenise the prompts of the run's shard.

    Args:
        config: ``map_keys``, ``data_errors`` and ``truncation``, which say what becomes of rows that cannot be used.
        settings: ``prompts``, ``shard``, ``max_new_tokens`` and ``scorer_columns``.
        rendering: Of the configuration.

    Raises:
        DataError: where the rows cannot be read, where some cannot be used and ``data_errors`` is ``fail``, where
            prompts are too long and ``truncation`` is ``error``, and where no prompt is left.
    """
    part, parts = settings.part
    seen: set[bytes] = set()
    problems: list[tuple[str, ExampleError]] = []
    prompts: list[SamplingPrompt] = []
    rows = 0
    for where, found in _rendered_rows(config, settings, rendering):
        rows += 1
        if isinstance(found, ExampleError):
            problems.append((where, found))
            continue
        prompt, (text, ids, room), columns = found
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if key not in seen:
            if len(seen) % parts == part:
                limit = min(room, settings.max_new_tokens or room)
                prompts.append(SamplingPrompt(len(seen), where, prompt, text, ids, limit, columns))
            seen.add(key)
    counts = Counter("too_long" if problem.kind == "too_long" else "unusable" for _, problem in problems)
    _judge(config, problems, rows)
    if not prompts:
        raise DataError(f"{settings.prompts}: no prompt is left of {rows} rows")
    return PromptSet(prompts, rows, rows - len(problems) - len(seen), counts["too_long"], counts["unusable"])


_Rendered = tuple[Prompt, tuple[str, list[int], int], Mapping[str, Any]]


def _rendered_rows(
    config: Config, settings: SamplingSettings, rendering: Rendering
) -> Iterator[tuple[str, _Rendered | ExampleError]]:
    reader = PromptReader(config.map_keys, takes_images=rendering.takes_images)
    columns = settings.row_columns
    for source in open_sources(settings.prompts, "train", [*dict.fromkeys([*reader.column_names, *columns])]):
        for number, example in source.examples():
            try:
                yield source.where(number), _rendered(example, reader, rendering, columns)
            except ExampleError as error:
                yield source.where(number), error


def _rendered(example: Any, reader: PromptReader, rendering: Rendering, columns: list[str]) -> _Rendered:
    if isinstance(example, ExampleError):
        raise example
    if isinstance(example, TokenizedPair):
        raise malformed("the row is tokenised: prompts are given as text or messages")
    prompt = reader.read_prompt(example)
    missing = [name for name in columns if name not in example]
    if missing:
        raise malformed(f"scorer_columns names the column `{missing[0]}`, which the row does not have")
    rendered = rendering.prompt(prompt)
    if rendered[2] < 1:
        raise ExampleError("too_long", f"the prompt has {len(rendered[1])} tokens, which leaves no room for an answer")
    return prompt, rendered, {name: example[name] for name in columns}


def _judge(config: Config, problems: list[tuple[str, ExampleError]], rows: int) -> None:
    long = [(where, problem) for where, problem in problems if problem.kind == "too_long"]
    others = [(where, problem) for where, problem in problems if problem.kind != "too_long"]
    complaints = []
    if others and config.data_errors == "fail":
        complaints.append(
            f"{len(others)} of {rows} rows have no prompt that can be used:\n{_listing(others)}\n"
            "Correct them, or set `data_errors: drop` to leave them out."
        )
    if long and config.truncation == "error":
        complaints.append(
            f"{len(long)} of {rows} prompts are too long for seq_length {config.seq_length}:\n{_listing(long)}\n"
            "Raise seq_length, or set `truncation: drop` to leave them out."
        )
    if complaints:
        raise DataError("\n".join(complaints))
    if problems:
        logger.warning("%d of %d rows are left out:\n%s", len(problems), rows, _listing(problems))


def _listing(problems: list[tuple[str, ExampleError]]) -> str:
    rest = len(problems) - _LISTED
    lines = [f"  {where}: {problem}" for where, problem in problems[:_LISTED]]
    return "\n".join(lines) + (f"\n  and {rest} more" if rest > 0 else "")
