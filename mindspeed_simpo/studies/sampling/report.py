"""The closing report of a sampling run: what became of every prompt and every answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any


@dataclass
class Report:
    """Counts of prompts and answers, and means over the pairs that were written."""

    rows: int
    unusable_rows: int
    too_long_prompts: int
    duplicate_prompts: int
    prompts: int
    """Distinct prompts of this shard."""
    answers: int = 0
    duplicate_answers: int = 0
    """Answers with the text of an earlier answer to the same prompt."""
    empty_answers: int = 0
    cut_answers: int = 0
    """Answers that reached the largest length without an end."""
    unusable_answers: int = 0
    """Answers that training would refuse."""
    unscored_answers: int = 0
    """Answers that the scorer gave no score."""
    pairs: int = 0
    too_few: int = 0
    """Prompts with fewer than two different answers with a score."""
    tied: int = 0
    """Prompts whose answers all have the same score."""
    cut: int = 0
    """Prompts for which every pair would have a cut answer as chosen."""
    below_gap: int = 0
    unlike_lengths: int = 0
    """Prompts without two answers of like length and different score."""
    refused: int = 0
    """Pairs that training would refuse."""
    refusals: dict[str, int] = field(default_factory=dict)
    """Why answers and pairs were refused, with counts."""
    means: dict[str, list[float]] = field(default_factory=dict)
    """Values over which the report has a mean."""

    def refuse(self, reason: str) -> None:
        """Count a reason of a refusal."""
        self.refusals[reason] = self.refusals.get(reason, 0) + 1

    def add_pair(self, **values: float) -> None:
        """Count a pair, and add its values to the means."""
        self.pairs += 1
        for name, value in values.items():
            self.means.setdefault(name, []).append(value)

    def as_dict(self) -> dict[str, Any]:
        """One flat object."""
        counts = asdict(self)
        del counts["means"], counts["refusals"]
        return counts | {f"mean_{name}": fmean(values) for name, values in self.means.items()}

    def lines(self) -> list[str]:
        """The same for people."""
        left = {
            "fewer than two answers to compare": self.too_few,
            "tied": self.tied,
            "better answer cut": self.cut,
            "gap too small": self.below_gap,
            "lengths too different": self.unlike_lengths,
            "refused by training": self.refused,
        }
        without = ", ".join(f"{count} {name}" for name, count in left.items() if count)
        lines = [
            f"{self.rows} rows: {self.prompts} prompts to sample, {self.duplicate_prompts} duplicates, "
            f"{self.too_long_prompts} too long, {self.unusable_rows} unusable",
            f"{self.answers} answers: {self.duplicate_answers} duplicates, {self.empty_answers} empty, "
            f"{self.cut_answers} cut, {self.unusable_answers} unusable, {self.unscored_answers} without a score",
            f"{self.pairs} pairs" + (f"; prompts without one: {without}" if without else ""),
        ]
        if self.pairs:
            mean = {name: fmean(values) for name, values in self.means.items()}
            lines.append(
                f"chosen: {mean['chosen_tokens']:.1f} tokens, score {mean['chosen_score']:.4g}; "
                f"rejected: {mean['rejected_tokens']:.1f} tokens, score {mean['rejected_score']:.4g}; "
                f"gap {mean['gap']:.4g} (means)"
            )
        common = sorted(self.refusals.items(), key=lambda item: -item[1])[:5]
        return lines + [f"refused {count} times: {reason}" for reason, count in common]
