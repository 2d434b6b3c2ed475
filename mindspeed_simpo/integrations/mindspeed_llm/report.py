"""Loss and metrics in the form of upstream's loop, log and tensorboard, and a log line with all metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from mindspeed_simpo.errors import TrainingError
from mindspeed_simpo.loss.metrics import pair_metrics
from mindspeed_simpo.loss.scoring import LossOfPairs, ScoredPairs, score
from mindspeed_simpo.losses import LossInputs

_UPSTREAM_NAMES = {"loss": "lm loss"}
"""Upstream's key of the training loss, which its tools parse."""

Metrics = dict[str, list[Tensor]]
"""Metric -> [sum over pairs, number of pairs]; upstream adds up micro-batches and divides afterwards."""


def joint_loss(
    objective: LossOfPairs, inputs: LossInputs, data_group: dist.ProcessGroup
) -> tuple[Float[Tensor, ""], Metrics]:
    """Mean loss of a micro-batch's pairs with its graph, and their metrics.

    Megatron-LM's schedule then takes the mean over micro-batches and data-parallel ranks.
    """
    total, scored = score(objective, inputs)
    return total / inputs.chosen_tokens.numel(), reduced_metrics(scored, data_group)


def reduced_metrics(scored: ScoredPairs, data_group: dist.ProcessGroup) -> Metrics:
    """Sums over the pairs of one micro-batch on all data-parallel ranks, and the number of these pairs; a collective.

    Args:
        scored: This rank's pairs.
        data_group: Data-parallel ranks, without the context-parallel ranks, which have the same pairs.

    Raises:
        TrainingError: where a loss is NaN.
    """
    if scored.output.loss.isnan().any():
        raise TrainingError(
            f"rank {dist.get_rank()}: the loss is not a number; look at the learning rate, the loaded checkpoint and "
            "the data"
        )
    values = pair_metrics(scored.inputs, scored.output, torch.float32)
    ones = torch.ones_like(scored.output.loss, dtype=torch.float32)
    sums = torch.stack([*values.values(), ones]).sum(dim=1)
    dist.all_reduce(sums, group=data_group)
    *totals, number = sums
    return {_UPSTREAM_NAMES.get(name, name): [total, number] for name, total in zip(values, totals, strict=True)}


class IterationReport:
    """Prints every metric once per ``--log-interval``: upstream's own line leaves out those that are not positive."""

    def __init__(self) -> None:
        self._totals: Metrics = {}

    def add(self, micro_batches: Sequence[Metrics]) -> None:
        """Add the metrics of one iteration, and print them where the iteration is logged.

        Args:
            micro_batches: Metrics that the schedule returned; empty except on the last pipeline rank.
        """
        from megatron.training import get_args
        from megatron.training.utils import print_rank_last

        for metrics in micro_batches:
            for name, (total, count) in metrics.items():
                sums = self._totals.setdefault(name, [torch.zeros_like(total), torch.zeros_like(count)])
                sums[0] += total
                sums[1] += count
        args = get_args()
        iteration = args.curr_iteration + 1
        if iteration % args.log_interval or not self._totals:
            return
        means = {name: (total / count).item() for name, (total, count) in self._totals.items()}
        self._totals = {}
        shown = " | ".join(f"{name}: {value:.6E}" for name, value in means.items())
        print_rank_last(f" {args.stage} iteration {iteration:8d}/{args.train_iters:8d} | {shown} |")
