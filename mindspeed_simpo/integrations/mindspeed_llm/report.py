"""Loss and metrics of pairs, as upstream's loop, log and tensorboard take them, and a line with all metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from mindspeed_simpo.batch import LossInputs
from mindspeed_simpo.errors import TrainingError
from mindspeed_simpo.loss.metrics import pair_metrics
from mindspeed_simpo.loss.scoring import LossOfPairs, ScoredPairs, score

_UPSTREAM_NAMES = {"loss": "lm loss"}
"""Upstream's key of the training loss, which its tools parse."""

Metrics = dict[str, list[Tensor]]
"""Metric -> [sum over pairs, number of pairs]: upstream divides after adding up micro-batches."""


def joint_loss(
    objective: LossOfPairs, inputs: LossInputs, data_group: dist.ProcessGroup
) -> tuple[Float[Tensor, ""], Metrics]:
    """Mean loss of a micro-batch's pairs with its graph, and their metrics.

    The schedule goes on to the mean over micro-batches and ranks.
    """
    total, scored = score(objective, inputs)
    return total / inputs.chosen_tokens.numel(), reduced_metrics(scored, data_group)


def reduced_metrics(scored: ScoredPairs, data_group: dist.ProcessGroup) -> Metrics:
    """Sums over the pairs of one micro-batch on all data-parallel ranks, with their number.

    Args:
        scored: This rank's pairs.
        data_group: Ranks that hold other pairs, without the context-parallel ones.

    Raises:
        TrainingError: a loss that is not a number.
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
        """Take what the schedule returned for one iteration; empty on ranks without the last pipeline stage."""
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
