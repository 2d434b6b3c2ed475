"""The records of a sampling run: prompts, answers, what was scored of them; and the protocols of its two engines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from mindspeed_simpo.data.prompts import Prompt


@dataclass(frozen=True)
class SamplingPrompt:
    """One prompt, rendered and tokenised as training does it."""

    index: int
    """Its place among all distinct prompts, from 0; seeds follow from it."""
    source: str
    """``FILE:LINE`` of its row."""
    prompt: Prompt
    text: str
    ids: Sequence[int]
    limit: int
    """Largest length of an answer, tokens, the end of turn included."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the row for the scorer's program."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The turns as plain objects."""
        return [message.for_template() for message in self.prompt.messages]


@dataclass(frozen=True)
class Answer:
    """One generated answer."""

    text: str
    """Without the end of turn and other special tokens."""
    cut: bool
    """Whether it reached the largest length without an end."""


@dataclass(frozen=True)
class Draw:
    """How answers are drawn, and how their token ids become text; the same for every generator."""

    tokenizer: PreTrainedTokenizerBase
    n: int
    temperature: float
    top_p: float
    seed: int
    end_ids: frozenset[int]
    """Token ids that end an answer: the end of turn, and the model's and tokenizer's own."""

    def seed_of(self, prompt: SamplingPrompt, answer: int = 0) -> int:
        """The seed of an answer: every answer of a run has its own, whatever the order of generation."""
        return (self.seed * 1_000_003 + prompt.index * self.n + answer) % 2**31

    def answer(self, ids: Sequence[int], limit: int, *, ended: bool = False) -> Answer:
        """The answer of generated token ids; without an end token among them it was cut, unless ``ended``."""
        ids = list(ids)[:limit]
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(str(text), end is None and not ended)


class Generator(Protocol):
    """What generates answers."""

    def answers(self, prompts: Sequence[SamplingPrompt], missing: frozenset[int]) -> Iterator[tuple[int, list[Answer]]]:
        """The ``n`` answers to each missing prompt, in any order; answers to other prompts may come too.

        Args:
            prompts: All prompts of the run, those with answers too: what is generated together follows from them, so
                that a run that goes on computes as one that was not interrupted.
            missing: Indices of the prompts without answers.
        """
        ...


@dataclass(frozen=True)
class Candidates:
    """The different answers to one prompt that can be trained on."""

    prompt: SamplingPrompt
    texts: Sequence[str]


class Scorer(Protocol):
    """What scores answers."""

    def scores(self, items: Iterable[Candidates]) -> Iterator[list[float | None]]:
        """For each item, in order, a score for each text: higher is better; None for an answer that has no score."""
        ...
