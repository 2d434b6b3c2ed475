"""Which trainer serves a stage, and what is said once at start."""

from __future__ import annotations

import sys
from argparse import Namespace

from megatron.training import get_args, print_rank_0

from mindspeed_simpo.integrations.mindspeed_llm import refusals

_UPSTREAM_RATIO = 1.4


def trainer_for(stage: str) -> object | None:
    """This package's trainer for ``stage``, or None where upstream's own serves it."""
    args = get_args()
    for line in _notes(args):
        print_rank_0(f"mindspeed_simpo: {line}")
    if not refusals.is_ours(args):
        return None
    if stage == "dpo":
        from mindspeed_simpo.integrations.mindspeed_llm.dpo import ExactDPOTrainer

        return ExactDPOTrainer()
    from mindspeed_simpo.integrations.mindspeed_llm.trainer import SimPOTrainer

    return SimPOTrainer()


def _notes(args: Namespace) -> list[str]:
    if args.stage == "simpo" and not _given("--gamma-beta-ratio"):
        return [
            f"--gamma-beta-ratio is {args.gamma_beta_ratio}, the SimPO authors' value for Llama-3-Instruct. "
            f"MindSpeed-LLM's default was {_UPSTREAM_RATIO}, which is their older gamma, not its ratio to beta."
        ]
    parallel = args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1
    if args.stage == "dpo" and parallel and not refusals.is_ours(args):
        return [
            "WARNING: MindSpeed-LLM's DPO has inexact gradients under tensor parallelism (the softmax term of shards "
            "that do not own the label is lost) and context parallelism (labels are shifted after slicing, and the "
            "loss is divided by the context-parallel size twice). Add --dpo-exact for exact ones."
        ]
    return []


def _given(flag: str) -> bool:
    return any(argument.split("=", 1)[0] == flag for argument in sys.argv[1:])
