"""The likelihoods of chosen and rejected responses over a run's training, from its ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindspeed_simpo.studies.analysis.scores import Numbers

_SIDES = ("chosen", "rejected")


def read_metrics(path: Path) -> list[Mapping[str, Any]]:
    """The lines of a ``metrics.jsonl``, without one that a killed run left incomplete; empty where there is no file."""
    if not path.is_file():
        return []
    lines: list[Mapping[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def displacement(lines: Sequence[Mapping[str, Any]]) -> dict[str, Numbers]:
    """Change of the average log-probabilities since the first line of each split.

    Args:
        lines: Of ``metrics.jsonl``, in order.

    Returns:
        For ``train`` and ``eval``, where there are lines of it: ``step``, ``chosen`` and ``rejected`` (nats per token),
        and ``chosen_change`` and ``rejected_change``, each less its first value.
    """
    found = {}
    for split in ("train", "eval"):
        kept = [line for line in lines if line.get("split") == split and _complete(line)]
        if not kept:
            continue
        numbers: Numbers = {"step": [line["step"] for line in kept]}
        for side in _SIDES:
            values = [float(line[f"logps/{side}"]) for line in kept]
            numbers |= {side: values, f"{side}_change": [value - values[0] for value in values]}
        found[split] = numbers
    return found


def _complete(line: Mapping[str, Any]) -> bool:
    values = [line.get("step"), *(line.get(f"logps/{side}") for side in _SIDES)]
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)
