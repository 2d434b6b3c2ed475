"""The registry of objectives: one file for each value of ``stage``, with formula, keys, ranges and texts.

Each file of this folder whose name does not begin with an underscore declares one ``OBJECTIVE``; a new file is a new
objective. These files import torch only when a formula is called, because the configuration reads the keys before torch
is imported.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import MappingProxyType

from mindspeed_simpo.objectives._declaration import Keys, Objective

__all__ = ["DEFAULT_STAGE", "METRICS", "OBJECTIVES", "Keys", "Objective", "unknown_metric"]

DEFAULT_STAGE = "simpo"
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "sft_loss",
    "response_tokens/chosen",
    "response_tokens/rejected",
)
"""Metrics of every objective; the metrics that an objective declares are logged after them."""


def _registry() -> dict[str, Objective]:
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            objective = importlib.import_module(f"{__name__}.{module.name}").OBJECTIVE
            assert objective.stage == module.name, f"objectives/{module.name}.py declares the stage {objective.stage!r}"
            found[objective.stage] = objective
    # the default is the first in help texts and tables
    return {stage: found[stage] for stage in sorted(found, key=lambda stage: (stage != DEFAULT_STAGE, stage))}


OBJECTIVES = MappingProxyType(_registry())
"""Value of ``stage`` -> objective."""


def unknown_metric(metric: str, objective: Objective) -> str | None:
    """Why evaluations with an objective have no such metric, in words; None where they have it.

    Args:
        metric: A name, which may be that of a source: ``source/NAME/METRIC``.
        objective: What the evaluations are with.
    """
    known = [*METRICS, *objective.metrics]
    name = metric.split("/", 2)[-1] if metric.startswith("source/") else metric
    if name in known:
        return None
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"evaluations with stage: {objective.stage} have no metric {metric!r}{hint}; they have {', '.join(known)}"
