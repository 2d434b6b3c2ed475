"""Alarms: signs in the lines of metrics that a run goes wrong, each with the numbers and with advice.

An alarm is raised once and stays silent until its condition has cleared. The alarms read nothing but the lines of
metrics, in their order, so that a resumed run rebuilds their state from the lines that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.training.watch.signs import (
    AccuracyEarly,
    AnswersGetLonger,
    ChosenFalls,
    GradientNormSpikes,
    HeldOutParts,
    Line,
    MarginsSaturate,
    Sign,
)


@dataclass(frozen=True)
class Alarm:
    """One alarm."""

    step: int
    name: str
    message: str
    """What was found, and the bound."""
    advice: str

    def __str__(self) -> str:
        return f"{self.name}, step {self.step}: {self.message}; {self.advice}"

    @property
    def line(self) -> dict[str, Any]:
        """The line of ``metrics.jsonl``."""
        return {
            "step": self.step,
            "split": "alarm",
            "alarm": self.name,
            "message": self.message,
            "advice": self.advice,
        }


class Alarms:
    """All alarms of a run.

    Args:
        config: Bounds, and what the bounds follow from.
        train_iters: Steps of the run.
    """

    def __init__(self, config: Config, train_iters: int) -> None:
        self._signs: dict[str, Sign] = {}
        self._raised: set[str] = set()
        if not config.alarms:
            return
        self._signs["chosen_falls"] = ChosenFalls(config.alarm_logps_fall)
        flat = config.objective.flat_beyond(config.keys_of(config.objective))
        if flat is not None:
            self._signs["margins_saturate"] = MarginsSaturate(flat)
        self._signs["accuracy_early"] = AccuracyEarly(train_iters, config.log_interval)
        self._signs["held_out_parts"] = HeldOutParts()
        self._signs["gradient_norm_spikes"] = GradientNormSpikes(config.clip_grad)
        self._signs["answers_get_longer"] = AnswersGetLonger()

    def read(self, line: Line) -> list[Alarm]:
        """The alarms that a line of metrics raises.

        Args:
            line: As written to ``metrics.jsonl``; lines of other splits than ``train`` and ``eval`` raise none.
        """
        if line["split"] not in ("train", "eval"):
            return []
        line = {key: value for key, value in line.items() if not isinstance(value, float) or math.isfinite(value)}
        line = {key: value for key, value in line.items() if value is not None}
        found = []
        for name, sign in self._signs.items():
            result = sign.read(line, raised=name in self._raised)
            if isinstance(result, str):
                if name not in self._raised:
                    found.append(Alarm(line["step"], name, result, sign.advice))
                self._raised.add(name)
            elif result is False:
                self._raised.discard(name)
        return found

    def replay(self, lines: Iterable[Line]) -> None:
        """Read the lines of the run before it was resumed; what they raise has been said."""
        for line in lines:
            self.read(line)
