"""Metrics of pairs: exact sums and counts for upstream's log and tensorboard, and a line with those that it hides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_simpo.batch import LossInputs, LossOutput

LOSS = "lm loss"
"""Upstream's key of the training loss, which its tools parse."""

Metrics = dict[str, list[Tensor]]
"""Metric -> [sum over pairs, number of pairs]: upstream divides after adding up micro-batches."""


def pair_metrics(inputs: LossInputs, output: LossOutput, data_group: dist.ProcessGroup) -> Metrics:
    """Sums over the pairs of one micro-batch on all data-parallel ranks, with their number.

    Args:
        inputs: Detached sums and counts.
        output: The objective's result.
        data_group: Ranks that hold other pairs, without the context-parallel ones.
    """
    chosen_tokens, rejected_tokens = inputs.chosen_tokens, inputs.rejected_tokens
    values = {
        LOSS: output.loss.detach(),
        "rewards/chosen": output.chosen_reward,
        "rewards/rejected": output.rejected_reward,
        "rewards/accuracies": (output.chosen_reward > output.rejected_reward).float(),
        "rewards/margins": output.chosen_reward - output.rejected_reward,
        "logps/chosen": inputs.chosen_logprob.detach() / chosen_tokens.clamp(min=1),
        "logps/rejected": inputs.rejected_logprob.detach() / rejected_tokens.clamp(min=1),
        "sft_loss": output.sft_loss,
        "response_tokens/chosen": chosen_tokens.float(),
        "response_tokens/rejected": rejected_tokens.float(),
    }
    sums = torch.stack([value.float().sum() for value in values.values()] + [inputs.valid.new_tensor(0.0).float()])
    sums[-1] = inputs.valid.numel()
    dist.all_reduce(sums, group=data_group)
    return {name: [total, sums[-1]] for name, total in zip(values, sums, strict=False)}


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
