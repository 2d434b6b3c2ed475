"""The stages that the plug-in trains, from the registry of objectives. This module does not import torch."""

from __future__ import annotations

from argparse import Namespace

from pydantic import ValidationError

from mindspeed_simpo.config.options import TaskOptions
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.objectives import OBJECTIVES, Objective

UPSTREAM_STAGE = "dpo"
"""The only objective that is also a stage of MindSpeed-LLM, and the only stage with a reference model: the reference's
rows follow the policy's in a batch. Without ``--dpo-exact`` upstream's own trainer runs."""

UPSTREAM_KEYS = ("dpo_beta", "dpo_loss_type", "dpo_label_smoothing", "pref_ftx")
"""Keys whose flags MindSpeed-LLM declares; its scripts pass them with any stage."""

SUPPORTED = tuple(stage for stage, each in OBJECTIVES.items() if not each.needs_reference and each.tracked is None)
"""Stages that need neither a reference model nor statistics of earlier global batches."""


def flag(key: str) -> str:
    """The command-line flag of a key."""
    return f"--{key.replace('_', '-')}"


def objective_of(args: Namespace) -> Objective | None:
    """The objective that ``args`` select from this package; None where upstream's own trainer runs."""
    if args.stage == UPSTREAM_STAGE and not args.dpo_exact:
        return None
    return OBJECTIVES.get(args.stage)


def reason_unsupported(objective: Objective) -> str | None:
    """Why the plug-in cannot train an objective that :func:`objective_of` returned; None where it can."""
    if objective.stage in (*SUPPORTED, UPSTREAM_STAGE):
        return None
    lacks = (
        f"a reference model, which MindSpeed-LLM builds for --stage {UPSTREAM_STAGE} alone"
        if objective.needs_reference
        else "statistics of the global batches so far, which MindSpeed-LLM does not keep in its checkpoints"
    )
    return (
        f"{objective.title} needs {lacks}; set --stage to one of {', '.join(SUPPORTED)}, or train it with "
        f"mindspeed-simpo train and stage: {objective.stage}"
    )


def task_options(args: Namespace, objective: Objective) -> TaskOptions:
    """The objective's options, from upstream's and this package's flags.

    Raises:
        ConfigError: a value out of its range, or two that do not agree.
    """
    keys = ("stage", *objective.keys.model_fields, "pref_ftx")
    try:
        return TaskOptions(**{key: getattr(args, key) for key in keys})
    except ValidationError as error:
        raise ConfigError("\n".join(_line(dict(item)) for item in error.errors(include_url=False))) from None


def _line(item: dict[str, object]) -> str:
    place = item["loc"]
    message = str(item["msg"]).removeprefix("Value error, ")
    # an error of several values has no location, and its message names the keys
    return f"{flag(str(place[0]))} {item['input']}: {message}" if isinstance(place, tuple) and place else message
