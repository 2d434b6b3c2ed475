"""Scores by a pairwise ranker."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from mindspeed_simpo.studies.sampling.record import Candidates
from mindspeed_simpo.studies.sampling.scorers.classifier import Classifier
from mindspeed_simpo.studies.sampling.scorers.reward import question_of


class PairRanker:
    r"""The mean probability that an answer wins against the others, each comparison in both orders.

    ``s_i = 1 / (2 (k - 1)) sum_{j != i} (p_ij + 1 - p_ji)``, where ``p_ij = sigmoid(logit)`` for answer i as the first
    and answer j as the second of k answers. The mean over both orders takes out a preference for a place.

    Args:
        classifier: Its output is above zero where the first answer is the better one.
        text: Format of what it reads, with ``{prompt}``, ``{first}`` and ``{second}``.
    """

    def __init__(self, classifier: Classifier, text: str) -> None:
        self._classifier, self._text = classifier, text

    def scores(self, items: Iterable[Candidates]) -> Iterator[list[float | None]]:
        """See :class:`~mindspeed_simpo.studies.sampling.record.Scorer`; None where a comparison is too long."""
        for item in items:
            k = len(item.texts)
            order = [(i, j) for i in range(k) for j in range(k) if i != j]
            prompt = question_of(item)
            texts = [self._compared(prompt, item.texts[i], item.texts[j]) for i, j in order]
            wins = dict(zip(order, self._classifier.logits(texts, special=True), strict=True))
            yield mean_wins(wins, k)

    def _compared(self, prompt: str, first: str, second: str) -> str:
        # one pass: a part may itself have braces
        parts = {"{prompt}": prompt, "{first}": first, "{second}": second}
        text, place = "", 0
        while place < len(self._text):
            part = next((name for name in parts if self._text.startswith(name, place)), None)
            text += parts[part] if part else self._text[place]
            place += len(part) if part else 1
        return text


def mean_wins(logits: dict[tuple[int, int], float | None], k: int) -> list[float | None]:
    """The scores of k answers from the logits of all ordered pairs; None for an answer with a missing comparison."""

    def score(i: int) -> float | None:
        sums: list[float] = []
        for j in range(k):
            if j == i:
                continue
            first, second = logits[i, j], logits[j, i]
            if first is None or second is None:
                return None
            sums.append(_sigmoid(first) + 1 - _sigmoid(second))
        return math.fsum(sums) / (2 * (k - 1))

    return [score(i) for i in range(k)]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
