"""Chosen and rejected one after the other: half the activations, the gradients of one joint backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import get_model_config
from torch import Tensor

from mindspeed_simpo.integrations.mindspeed_llm.pairs import mean_loss, pair_inputs, row_tokens
from mindspeed_simpo.integrations.mindspeed_llm.report import Metrics, pair_metrics
from mindspeed_simpo.loss.scoring import LossOfPairs
from mindspeed_simpo.parallel import Groups


@dataclass(frozen=True)
class Rows:
    """What upstream's ``get_batch`` returns, less the loss mask; rows ``[chosen, rejected]``."""

    tokens: Int[Tensor, "row seq"]
    targets: Int[Tensor, "row seq"]
    attention_mask: Any
    """``Bool[Tensor, "row 1 seq seq"]``, a list of masks by context-parallel rank, or None."""
    position_ids: Tensor | None

    def halves(self) -> tuple[Rows, Rows]:
        """Chosen rows and rejected rows."""
        parts = [_halves(getattr(self, field.name), self.tokens.shape[0]) for field in fields(self)]
        chosen, rejected = zip(*parts, strict=True)
        return Rows(*chosen), Rows(*rejected)


Score = Callable[[torch.nn.Module, Rows], Float[Tensor, " row"]]


def forward_step(
    model: torch.nn.Module, rows: Rows, score: Score, objective: LossOfPairs, groups: Groups
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Metrics]]]:
    """Rejected without a graph; chosen with its backward; rejected with the graph that the schedule's backward uses.

    With ``s_w, s_l`` the sums and L the loss, the first backward carries ``dL/ds_w`` and the second ``dL/ds_l``; only
    one graph is alive at a time. The first runs with gradient synchronisation off: a parameter is ready when it has
    both.

    Returns:
        The rejected rows' sums, and the function that makes of them the micro-batch's loss (value L, gradient dL/ds_l)
        and metrics.
    """
    chosen_rows, rejected_rows = rows.halves()
    with torch.no_grad():
        rejected = score(model, rejected_rows)
    chosen = score(model, chosen_rows)
    sums = torch.cat([chosen.detach(), rejected]).requires_grad_()
    inputs = pair_inputs(sums, row_tokens(rows.targets, groups))
    output = objective(inputs)
    loss = mean_loss(output)
    chosen_grad, rejected_grad = torch.autograd.grad(loss, sums)[0].chunk(2)
    with _without_gradient_sync(model):
        torch.autograd.backward(chosen, chosen_grad * _schedule_scale(model, groups))
    metrics = pair_metrics(inputs, output, groups.data)
    return score(model, rejected_rows), partial(_second_loss, loss.detach(), rejected_grad, metrics)


def _second_loss(
    loss: Tensor, rejected_grad: Float[Tensor, " row"], metrics: Metrics, rejected: Float[Tensor, " row"]
) -> tuple[Tensor, Metrics]:
    surrogate = (rejected * rejected_grad).sum()
    return loss + surrogate - surrogate.detach(), metrics


def _schedule_scale(model: torch.nn.Module, groups: Groups) -> Any:
    # what megatron's schedule and backward step multiply the loss of this micro-batch with
    scale = groups.context.size() / get_num_microbatches()
    grad_scale = get_model_config(model).grad_scale_func
    return scale if grad_scale is None else grad_scale(torch.tensor(scale, device=next(model.parameters()).device))


@contextmanager
def _without_gradient_sync(model: torch.nn.Module) -> Iterator[None]:
    # megatron's no_sync ends with synchronisation on, whatever was before: the schedule may be inside one of its own
    buckets = [*getattr(model, "bucket_groups", ()), *getattr(model, "expert_parallel_bucket_groups", ())]
    before = [bucket.is_last_microbatch for bucket in buckets]
    for bucket in buckets:
        bucket.is_last_microbatch = False
    try:
        yield
    finally:
        for bucket, value in zip(buckets, before, strict=True):
            bucket.is_last_microbatch = value


def _halves(value: Any, num_rows: int) -> tuple[Any, Any]:
    if isinstance(value, Tensor) and value.shape[0] == num_rows:
        first, second = value.chunk(2)
        return first, second
    if isinstance(value, list):
        halves = [_halves(item, num_rows) for item in value]
        return [half[0] for half in halves], [half[1] for half in halves]
    # None, or one mask for all rows
    return value, value
