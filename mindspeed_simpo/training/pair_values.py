"""Values of single pairs, gathered from all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor

from mindspeed_simpo.batch import PairBatch
from mindspeed_simpo.device import Device
from mindspeed_simpo.loss.scoring import ScoredBatch
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.training.schedule.runner import PairSchedule


def pair_values(
    schedule: PairSchedule,
    steps: Iterable[list[PairBatch]],
    pairs: Int64[np.ndarray, " pair"],
    groups: Groups,
    device: Device,
    on_step: Callable[[], None],
    columns: int,
    values_of: Callable[[ScoredBatch], Sequence[Tensor]],
) -> Float[Tensor, "pair column"]:
    """Evaluate pairs with the current weights; a collective of the world.

    Args:
        schedule: Evaluates the micro-batches.
        steps: This rank's micro-batches of each global batch of ``pairs``.
        pairs: Indices of the pairs, ascending.
        groups: The values are all-reduced over ``groups.world``.
        device: The device of the values.
        on_step: Called after each global batch, for progress.
        columns: Number of values of a pair.
        values_of: Returns ``columns`` tensors with the values of a micro-batch's pairs.

    Returns:
        fp64 (fp32 on NPUs), the same on every rank.
    """
    ids = torch.from_numpy(pairs).to(device.torch_device)
    values = torch.zeros(len(pairs), columns, dtype=device.reduction_dtype, device=device.torch_device)
    for micro_batches in steps:
        for item in schedule.forward(micro_batches):
            real = item.batch.pair_ids >= 0
            rows = torch.stack([each.to(values.dtype) for each in values_of(item)], dim=1)
            values[torch.searchsorted(ids, item.batch.pair_ids[real])] = rows[real]
        on_step()
    if not groups.contributes_loss:
        values.zero_()
    dist.all_reduce(values, group=groups.world)
    return values
