"""From the scored answers to one prompt to a pair: best against worst, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Reason = Literal["too_few", "tied", "cut", "below_gap", "unlike_lengths"]
"""Why a prompt gives no pair: fewer than two different answers with a score; all scores are equal; every pair would
have a cut answer as chosen; the gap is too small; no two answers of like length differ in score."""


@dataclass(frozen=True)
class Scored:
    """One answer of a prompt."""

    score: float
    tokens: int
    """As trained, the end of turn included."""
    cut: bool


def select(
    answers: Sequence[Scored], *, min_gap: float, max_length_ratio: float | None, cut_may_be_chosen: bool
) -> tuple[int, int] | Reason:
    r"""``argmax (s_i - s_j)`` over the pairs of answers (i, j) that may be chosen and rejected.

    Without length control these are best and worst. With it, ``max(n_i, n_j) / min(n_i, n_j) <= max_length_ratio``.

    Args:
        answers: Different texts, with their scores s and lengths n in tokens.
        min_gap: Smallest ``s_i - s_j``, >= 0; the gap is above zero in any case.
        max_length_ratio: Largest ratio of lengths, >= 1; None for no length control.
        cut_may_be_chosen: Whether an answer without an end may be chosen.

    Returns:
        The places of chosen and rejected, the first ones among equals; or the reason why there is no pair.
    """
    if len(answers) < 2:
        return "too_few"
    scores = [answer.score for answer in answers]
    if max(scores) == min(scores):
        return "tied"
    pairs = [
        (better.score - worse.score, i, j)
        for i, better in enumerate(answers)
        for j, worse in enumerate(answers)
        if better.score > worse.score and (cut_may_be_chosen or not better.cut)
    ]
    if not pairs:
        return "cut"
    if max_length_ratio is not None:
        pairs = [pair for pair in pairs if _ratio(answers[pair[1]], answers[pair[2]]) <= max_length_ratio]
        if not pairs:
            return "unlike_lengths"
    gap, chosen, rejected = max(pairs, key=lambda pair: pair[0])
    return "below_gap" if gap < min_gap else (chosen, rejected)


def _ratio(first: Scored, second: Scored) -> float:
    return max(first.tokens, second.tokens) / min(first.tokens, second.tokens)
