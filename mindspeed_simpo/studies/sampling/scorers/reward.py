"""Scores by a reward model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.studies.sampling.record import Candidates
from mindspeed_simpo.studies.sampling.scorers.classifier import Classifier


class RewardModel:
    """The output of a sequence classifier for the conversation of prompt and answer.

    The conversation is rendered by the reward model's own chat template; without a template the model reads prompt and
    answer as a pair of texts, the prompt's turns one below the other.
    """

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier

    def scores(self, items: Iterable[Candidates]) -> Iterator[list[float | None]]:
        """See :class:`~mindspeed_simpo.studies.sampling.record.Scorer`.

        Raises:
            ModelError: where the chat template refuses a conversation.
        """
        for item in items:
            if self._classifier.tokenizer.chat_template:
                yield self._classifier.logits([self._rendered(item, text) for text in item.texts], special=False)
            else:
                question = question_of(item)
                yield self._classifier.logits([(question, text) for text in item.texts], special=True)

    def _rendered(self, item: Candidates, answer: str) -> str:
        messages = [*item.prompt.messages, {"role": "assistant", "content": answer}]
        try:
            return str(self._classifier.tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ModelError(
                f"--reward-model: its chat template refuses the conversation of {item.prompt.source}: {reason}"
            ) from None


def question_of(item: Candidates) -> str:
    """The turns of a prompt as one text."""
    return "\n".join(message.content for message in item.prompt.prompt.messages)
