"""Collectives with the gradient that the schedules expect, and errors that all ranks raise together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_simpo.errors import SimpoError

# newer torch renamed them
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _CopyWithSummedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SumWithIdentityBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: ARG004
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None


class _GatherWithScatteredBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = value.new_empty(group.size() * value.shape[0], *value.shape[1:])
        _all_gather(whole, value.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        part = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        _reduce_scatter(part, grad, group=ctx.group)
        return part, None


def gather_along_first(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' parts one after the other along the first axis; backward sums each part's gradient over the ranks.

    Args:
        value: This rank's part; the same shape on every rank.
        group: Ranks that hold the parts.
    """
    if group.size() == 1:
        return value
    whole: Tensor = _GatherWithScatteredBackward.apply(value, group)  # type: ignore[no-untyped-call]
    return whole


def copy_to(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``value``, which every rank holds; backward sums the ranks' gradients.

    Right where each rank goes on with its own shard of a weight: ``dL/dvalue`` is then spread over the ranks.

    Args:
        value: Any shape; the same on every rank.
        group: Ranks that use it.
    """
    if group.size() == 1:
        return value
    copied: Tensor = _CopyWithSummedBackward.apply(value, group)  # type: ignore[no-untyped-call]
    return copied


def sum_over(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``sum_r value_r`` on every rank; backward hands each rank the gradient of its own part.

    Right where every rank goes on to compute the same loss from the sum and gradients are summed over the group
    afterwards: each rank then contributes ``dL/dvalue_r`` once.

    Args:
        value: Any shape; a part of the sum.
        group: Ranks that hold the parts.
    """
    if group.size() == 1:
        return value
    summed: Tensor = _SumWithIdentityBackward.apply(value, group)  # type: ignore[no-untyped-call]
    return summed


@contextmanager
def fail_together(group: dist.ProcessGroup) -> Iterator[None]:
    """Run the body on every rank of ``group``; where any of them fails, all raise, so that none waits for the lost one.

    Raises:
        SimpoError: on every rank, the error of the lowest failing rank. An error that is not a :class:`SimpoError` is
            raised as it is on its own rank, and as a :class:`SimpoError` that names it on the others.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    report = own if own is None or isinstance(own, SimpoError) else SimpoError(f"{type(own).__name__}: {own}")
    reports: list[SimpoError | None] = [None] * group.size()
    dist.all_gather_object(reports, report, group=group)
    if own is not None and not isinstance(own, SimpoError):
        raise own
    for reported in reports:
        if reported is not None:
            reported.everywhere = True
            raise reported from None
