"""The flags, their validation and the one patch, as two features of MindSpeed."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from typing import Any, Literal, get_args, get_origin

from mindspeed.features_manager.feature import MindSpeedFeature
from mindspeed.features_manager.features_manager import MindSpeedFeaturesManager
from pydantic.fields import FieldInfo

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.ranges import describe_range
from mindspeed_simpo.integrations.mindspeed_llm import refusals, stages
from mindspeed_simpo.integrations.mindspeed_llm.schedules import pair_rows_wrapper
from mindspeed_simpo.objectives import OBJECTIVES


class SimpoArguments(MindSpeedFeature):  # type: ignore[misc]
    """Adds the objectives to ``--stage``, their keys and this package's options as flags, and refuses what cannot work.

    An objective that the plug-in cannot train has its flags too, so that its refusal can say why.
    """

    def __init__(self) -> None:
        super().__init__("mindspeed_simpo_arguments", optimization_level=0)

    def register_args(self, parser: ArgumentParser) -> None:
        """Add the stages and flags that the parser does not have yet."""
        group = parser.add_argument_group(title="mindspeed_simpo")
        for objective in OBJECTIVES.values():
            self.add_parser_argument_choices_value(parser, "--stage", objective.stage)
            for key, field in objective.keys.model_fields.items():
                if key not in stages.UPSTREAM_KEYS:
                    _add(group, key, **_argument(field))
        options = Config.model_fields
        _add(group, "pair_schedule", **_argument(options["pair_schedule"]) | {"choices": ["concat", "two_pass"]})
        _add(group, "fused_logprob", action="store_true", help=options["fused_logprob"].description)
        _add(group, "logprob_chunk_tokens", type=int, help=options["logprob_chunk_tokens"].description)
        exact = f"With --stage {stages.UPSTREAM_STAGE}: gradients that are exact under tensor and context parallelism."
        _add(group, "dpo_exact", action="store_true", help=exact)

    def validate_args(self, args: Namespace) -> None:
        """Refuse, before anything is built, what cannot work."""
        refusals.check(args)


class SimpoSchedule(MindSpeedFeature):  # type: ignore[misc]
    """Multiplies the micro-batch size of the pipeline schedules by the number of rows of a pair."""

    def __init__(self) -> None:
        super().__init__("mindspeed_simpo_schedule", optimization_level=0)

    def register_patches(self, patch_manager: Any, args: Namespace) -> None:
        """Wrap the function through which training and evaluation get their schedule."""
        if stages.objective_of(args) is not None:
            patch_manager.register_patch(
                "megatron.core.pipeline_parallel.schedules.get_forward_backward_func", pair_rows_wrapper
            )


def insert() -> None:
    """Insert both features into MindSpeed's list.

    The feature with the flags follows the feature that declares ``--stage``, because the ``register_args`` of a later
    feature parses the command line. The feature with the patch is the last, so that its wrapper is the outermost.
    """
    features = MindSpeedFeaturesManager.FEATURES_LIST
    names = [type(feature).__name__ for feature in features]
    features.insert(names.index("MegatronBasicFeature") + 1, SimpoArguments())
    features.append(SimpoSchedule())


def _add(group: _ArgumentGroup, key: str, **options: Any) -> None:
    # MindSpeed calls register_args more than once with the same parser
    if stages.flag(key) not in group._option_string_actions:
        group.add_argument(stages.flag(key), **options)


def _argument(field: FieldInfo) -> dict[str, Any]:
    """Arguments of ``add_argument`` for an option: type, choices, default and help."""
    bounds = describe_range(field)
    text = f"{field.description} ({bounds})" if bounds else str(field.description)
    known: dict[str, Any] = {"default": field.default, "help": text.replace("%", "%%")}
    if field.annotation is bool:
        return known | {"action": argparse.BooleanOptionalAction}
    if get_origin(field.annotation) is Literal:
        return known | {"type": str, "choices": list(get_args(field.annotation))}
    assert field.annotation in (int, float), f"no flag for a key of type {field.annotation}"
    return known | {"type": field.annotation}
