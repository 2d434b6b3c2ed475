"""The reference pass: every pair scored once, forward only, before training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from mindspeed_simpo.batch import LossInputs, LossOutput, PairBatch
from mindspeed_simpo.device import Device
from mindspeed_simpo.loss.reference import ReferenceTable
from mindspeed_simpo.loss.scoring import PairScorer
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.training.schedule.runner import PairSchedule


def compute(
    schedule: PairSchedule,
    steps: Iterable[list[PairBatch]],
    num_pairs: int,
    groups: Groups,
    device: Device,
    on_step: Callable[[], None],
) -> ReferenceTable:
    """Score every pair with the model as it stands.

    Args:
        schedule: Holds the reference weights; its loss is not computed.
        steps: This rank's micro-batches, global batch by global batch, that cover the dataset.
        num_pairs: Rows of the dataset.
        groups: The sums are put together over ``groups.world``.
        device: Where the table lives.
        on_step: Called after each global batch, for progress.
    """
    schedule = dataclasses.replace(schedule, scorer=PairScorer(_no_loss))
    sums = torch.zeros(num_pairs, 2, dtype=device.reduction_dtype, device=device.torch_device)
    for micro_batches in steps:
        for item in schedule.forward(micro_batches):
            real = item.batch.pair_ids >= 0
            rows = torch.stack([item.inputs.chosen_logprob, item.inputs.rejected_logprob], dim=1)
            sums[item.batch.pair_ids[real]] = rows[real]
        on_step()
    if not groups.counts_its_loss:
        sums.zero_()
    dist.all_reduce(sums, group=groups.world)
    return ReferenceTable(sums)


def _no_loss(inputs: LossInputs) -> LossOutput:
    nothing = torch.zeros_like(inputs.chosen_logprob)
    return LossOutput(nothing, nothing, nothing, nothing)
