"""The signs that a run goes wrong: each reads the lines of metrics, in their order, and nothing else."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

Line = Mapping[str, Any]

WINDOW = 5
"""Lines of the split ``train`` whose mean is compared: a line is the mean over one batch."""
EARLY = 0.2
"""Part of the steps in which accuracy 1 is too early."""
PERFECT = 0.995
"""Accuracy from which the pairs are all told apart."""
TOLD_APART = 0.98
"""Least accuracy at which large mean margins are not those of a few pairs."""
SLACK = 0.03
"""An alarm of an accuracy is cleared that much below its bound."""
PARTING = 0.05
"""Rise of the held-out loss above its lowest value, as part of the first one."""
SPIKE = 10.0
"""Gradient norm over the median of the norms before it."""
NORMS = 50
"""Gradient norms whose median is taken."""
LEAST_NORMS = 10
LONGER = 1.5
"""Mean tokens of the answers over those of the first evaluation."""
CLEARED = 0.8
"""Part of a bound below which an alarm is cleared."""


class Sign(Protocol):
    """One sign."""

    advice: str

    def read(self, line: Line, *, raised: bool) -> str | bool | None:
        """The message where the line shows the sign, False where it clears the alarm, None where it says nothing.

        Args:
            line: The next line of the split ``train`` or ``eval``.
            raised: Whether the alarm is raised.
        """


class Window:
    """Mean of a metric over the last lines of the split ``train``."""

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self._values: deque[float] = deque(maxlen=WINDOW)

    def mean(self, line: Line) -> float | None:
        """The mean after a line; None before the window is full, and for a line of another split."""
        value = line.get(self._metric)
        if line["split"] != "train" or value is None:
            return None
        self._values.append(value)
        return statistics.fmean(self._values) if len(self._values) == WINDOW else None


class ChosenFalls:
    """``first - now > bound`` of ``logps/chosen``, of the held-out pairs or, over a window, of the training pairs."""

    advice = (
        "the answers that are preferred become unlikely too, and generations may degrade: lower lr, give pref_ftx some "
        "weight (0.1 to 1), and read answers with eval_generate"
    )

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self._window = Window("logps/chosen")
        self._first: dict[str, float] = {}
        self._fallen: dict[str, float] = {}

    def read(self, line: Line, *, raised: bool) -> str | bool | None:  # noqa: D102
        split = line["split"]
        now = line.get("logps/chosen") if split == "eval" else self._window.mean(line)
        if now is None:
            return None
        first = self._first.setdefault(split, now)
        self._fallen[split] = first - now
        if max(self._fallen.values()) <= self._bound * (CLEARED if raised else 1):
            return False
        if self._fallen[split] <= self._bound:
            return None
        pairs = "held-out pairs" if split == "eval" else f"training pairs, mean of {WINDOW} lines"
        return (
            f"logps/chosen fell from {first:.3f} to {now:.3f} nats per token ({pairs}), by {first - now:.3f}, more "
            f"than alarm_logps_fall {self._bound:g}"
        )


class MarginsSaturate:
    """``rewards/margins > flat_beyond`` of the objective, of pairs that are told apart, over a window."""

    advice = (
        "most pairs have next to no gradient left, and further steps learn from few of them: stop earlier "
        "(metric_for_best_model, early_stopping_patience), lower lr or the reward scale, or train on harder pairs"
    )

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self._margins, self._accuracies = Window("rewards/margins"), Window("rewards/accuracies")

    def read(self, line: Line, *, raised: bool) -> str | bool | None:  # noqa: D102
        margin, accuracy = self._margins.mean(line), self._accuracies.mean(line)
        if margin is None or accuracy is None:
            return None
        slack = SLACK if raised else 0.0
        if margin <= self._bound * (CLEARED if raised else 1) or accuracy < TOLD_APART - slack:
            return False
        return (
            f"rewards/margins is {margin:.2f}, accuracy {accuracy:.3f} (training pairs, mean of {WINDOW} lines): "
            f"beyond {self._bound:.2f} a pair has less than 1 % of the largest gradient"
        )


class AccuracyEarly:
    """``rewards/accuracies`` is 1 over a window in the first part of the steps, or before the first step."""

    advice = (
        "what tells chosen from rejected may be trivial, such as length, format or a phrase, or held in both parts of "
        "the data: read some pairs with `mindspeed-simpo check`, and compare their lengths; else lower lr"
    )

    def __init__(self, steps: int, log_interval: int) -> None:
        self._early = max(EARLY * steps, min(WINDOW * log_interval, steps / 2))
        self._steps = steps
        self._accuracies = Window("rewards/accuracies")

    def read(self, line: Line, *, raised: bool) -> str | bool | None:  # noqa: D102
        if line["split"] == "eval":
            accuracy = line.get("rewards/accuracies", 0.0)
            if line["step"] == 0 and accuracy >= PERFECT:
                return f"rewards/accuracies of the held-out pairs is {accuracy:.3f} before any step"
            return None
        window = self._accuracies.mean(line)
        if window is None:
            return None
        if window < PERFECT:
            return False if not raised or window < PERFECT - SLACK else None
        if line["step"] > self._early:
            return None
        return (
            f"rewards/accuracies is {window:.3f} (training pairs, mean of {WINDOW} lines) after {line['step']} of "
            f"{self._steps} steps, in the first {self._early / self._steps:.0%} of the run"
        )


class HeldOutParts:
    """``L > L_min + 0.05 max(|L_first|, 0.1)`` of the held-out loss, while the training loss has fallen since."""

    advice = (
        "the run learns its training pairs by heart: stop at the lowest held-out loss (metric_for_best_model: loss, "
        "early_stopping_patience), make fewer passes, lower lr, or add pairs"
    )

    def __init__(self) -> None:
        self._window = Window("loss")
        self._accuracies = Window("rewards/accuracies")
        self._train: float | None = None
        self._accuracy = 0.0
        self._first: float | None = None
        self._lowest: tuple[float, int, float | None] | None = None

    def read(self, line: Line, *, raised: bool) -> str | bool | None:  # noqa: D102
        if line["split"] == "train":
            self._train = self._window.mean(line)
            self._accuracy = self._accuracies.mean(line) or 0.0
            return None
        loss = line.get("loss")
        if loss is None:
            return None
        self._first = loss if self._first is None else self._first
        if self._lowest is None or loss <= self._lowest[0]:
            self._lowest = loss, line["step"], self._train
            return False
        lowest, step, train_then = self._lowest
        bound = PARTING * max(abs(self._first), 0.1)
        if loss - lowest <= bound * (CLEARED if raised else 1):
            return False
        if self._train is None or (train_then is not None and self._train >= train_then):
            return None
        held_out = line.get("rewards/accuracies", math.nan)
        then = "" if train_then is None else f" from {train_then:.4f}"
        return (
            f"held-out loss rose from {lowest:.4f} at step {step} to {loss:.4f}, by more than {bound:.4f}, while the "
            f"training loss fell{then} to {self._train:.4f}; accuracy {held_out:.3f} held out, {self._accuracy:.3f} in "
            "training"
        )


class GradientNormSpikes:
    """``grad_norm > 10 median`` of the norms before it, and above ``clip_grad``."""

    advice = (
        "a batch of unusual pairs, or lr too high: look whether loss and accuracy come back; if spikes repeat, lower "
        "lr, lengthen lr_warmup_fraction, or lower clip_grad"
    )

    def __init__(self, clip: float) -> None:
        self._clip = clip
        self._norms: deque[float] = deque(maxlen=NORMS)
        self._calm = 0

    def read(self, line: Line, *, raised: bool) -> str | bool | None:  # noqa: D102
        norm = line.get("grad_norm")
        if norm is None:
            return None
        before = list(self._norms)
        self._norms.append(norm)
        if len(before) < LEAST_NORMS:
            return None
        median = statistics.median(before)
        if norm > SPIKE * median and norm > self._clip:
            self._calm = 0
            return (
                f"grad_norm {norm:.3g} is more than {SPIKE:g} times {median:.3g}, the median of the {len(before)} "
                "lines before it"
            )
        self._calm += 1
        # spikes that come again and again are one alarm
        return False if not raised or self._calm >= 2 * LEAST_NORMS else None


class AnswersGetLonger:
    """``answer_tokens > 1.5`` times those of the first evaluation."""

    advice = (
        "the objective may reward length: compare response_tokens/chosen and response_tokens/rejected, read "
        "samples.jsonl for repetition, and use a length-normalised objective, more gamma_beta_ratio or pref_ftx, or a "
        "lower lr"
    )

    def __init__(self) -> None:
        self._first: float | None = None

    def read(self, line: Line, *, raised: bool) -> str | bool | None:  # noqa: D102
        tokens = line.get("answer_tokens")
        if tokens is None:
            return None
        if self._first is None:
            self._first = tokens
        factor = tokens / max(self._first, 1.0)
        if factor <= LONGER * (CLEARED if raised else 1):
            return False
        return (
            f"answers to held-out prompts have {tokens:.1f} tokens on average, {self._first:.1f} at the first "
            f"evaluation: {factor:.2f} times as many, more than {LONGER:g} times"
        )
