"""The trainer of a stage, and the notes that are printed once at start."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator

from megatron.training import get_args, print_rank_0

from mindspeed_simpo.integrations.mindspeed_llm import stages
from mindspeed_simpo.objectives import Objective

_OTHER_DEFAULTS = {"gamma_beta_ratio": (1.4, "which is the SimPO authors' older gamma, not its ratio to beta")}
"""Key -> MindSpeed-LLM's default where that differs from the objective's default, and the reason for the difference."""


def trainer() -> object | None:
    """This package's trainer for ``args.stage``; None for the stages of upstream's own trainers."""
    args = get_args()
    objective = stages.objective_of(args)
    for line in _upstream_warnings(args) if objective is None else _notes(args, objective):
        print_rank_0(f"mindspeed_simpo: {line}")
    if objective is None:
        return None
    if objective.needs_reference:
        from mindspeed_simpo.integrations.mindspeed_llm.dpo import ExactDPOTrainer

        return ExactDPOTrainer()
    from mindspeed_simpo.integrations.mindspeed_llm.trainer import PairTrainer

    return PairTrainer()


def _notes(args: Namespace, objective: Objective) -> Iterator[str]:
    for key in objective.keys.model_fields:
        if key in _OTHER_DEFAULTS and not _given(stages.flag(key)):
            other, reason = _OTHER_DEFAULTS[key]
            yield f"{stages.flag(key)} is {getattr(args, key)}. MindSpeed-LLM's default was {other}, {reason}."


def _upstream_warnings(args: Namespace) -> Iterator[str]:
    if args.stage == stages.UPSTREAM_STAGE and max(args.tensor_model_parallel_size, args.context_parallel_size) > 1:
        yield (
            "WARNING: MindSpeed-LLM's DPO has inexact gradients under tensor parallelism (the softmax term of shards "
            "that do not own the label is lost) and context parallelism (labels are shifted after slicing, and the "
            "loss is divided by the context-parallel size twice). Add --dpo-exact for exact ones."
        )


def _given(flag: str) -> bool:
    return any(argument.split("=", 1)[0] == flag for argument in sys.argv[1:])
