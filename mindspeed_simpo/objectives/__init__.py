"""The registry of objectives: one file for each value of ``stage``, with formula, keys, ranges and texts.

Each file of this folder whose name does not begin with an underscore declares one ``OBJECTIVE``; a new file is a new
objective. These files import torch only when a formula is called, because the configuration reads the keys before torch
is imported.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import MappingProxyType

from mindspeed_simpo.objectives._declaration import Keys, Objective

__all__ = ["DEFAULT_STAGE", "METRICS", "OBJECTIVES", "Keys", "Objective"]

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
