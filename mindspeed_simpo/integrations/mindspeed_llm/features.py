"""The flags, their validation and the one patch, as two features of MindSpeed."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _ArgumentGroup
from typing import Any

from mindspeed.features_manager.feature import MindSpeedFeature
from mindspeed.features_manager.features_manager import MindSpeedFeaturesManager

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.integrations.mindspeed_llm import refusals
from mindspeed_simpo.integrations.mindspeed_llm.schedules import pair_rows_wrapper


class SimpoArguments(MindSpeedFeature):  # type: ignore[misc]
    """Adds ``simpo`` to ``--stage`` and this package's flags, and refuses what cannot work."""

    def __init__(self) -> None:
        super().__init__("mindspeed_simpo_arguments", optimization_level=0)

    def register_args(self, parser: ArgumentParser) -> None:
        """Add the flags that the parser does not have yet."""
        self.add_parser_argument_choices_value(parser, "--stage", "simpo")
        group = parser.add_argument_group(title="mindspeed_simpo")
        for name in ("simpo_beta", "gamma_beta_ratio", "simpo_label_smoothing"):
            _add(group, name, type=float)
        _add(group, "simpo_loss_type", type=str, choices=["sigmoid", "hinge", "ipo"])
        _add(group, "pair_schedule", type=str, choices=["concat", "two_pass"])
        _add(group, "fused_logprob", action="store_true", default=False)
        _add(group, "logprob_chunk_tokens", type=int)
        if "--dpo-exact" not in group._option_string_actions:
            group.add_argument(
                "--dpo-exact",
                action="store_true",
                help="With --stage dpo: log-probabilities that are exact under tensor and context parallelism.",
            )

    def validate_args(self, args: Namespace) -> None:
        """Refuse, before anything is built, what cannot work."""
        refusals.check(args)


class SimpoSchedule(MindSpeedFeature):  # type: ignore[misc]
    """Tells the pipeline schedules that a pair is more than one row."""

    def __init__(self) -> None:
        super().__init__("mindspeed_simpo_schedule", optimization_level=0)

    def register_patches(self, patch_manager: Any, args: Namespace) -> None:
        """Wrap the function through which training and evaluation get their schedule."""
        if refusals.is_ours(args):
            patch_manager.register_patch(
                "megatron.core.pipeline_parallel.schedules.get_forward_backward_func", pair_rows_wrapper
            )


def insert() -> None:
    """Put both features into MindSpeed's list.

    The flags go right after the feature that declares ``--stage``: a later one parses the command line from inside its
    ``register_args``. The patch goes last, so that it is the outermost wrapper.
    """
    features = MindSpeedFeaturesManager.FEATURES_LIST
    names = [type(feature).__name__ for feature in features]
    features.insert(names.index("MegatronBasicFeature") + 1, SimpoArguments())
    features.append(SimpoSchedule())


def _add(group: _ArgumentGroup, name: str, **options: Any) -> None:
    """Add the engine's option ``name``, with its default and its help, where upstream has not done so."""
    flag = "--" + name.replace("_", "-")
    if flag not in group._option_string_actions:
        field = Config.model_fields[name]
        group.add_argument(flag, **{"default": field.default, "help": field.description} | options)
