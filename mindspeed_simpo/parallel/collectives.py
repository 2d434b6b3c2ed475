"""Differentiable collectives, each with a stated backward, and exceptions that all ranks raise together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_simpo.errors import SimpoError

T = TypeVar("T")

# newer versions of torch have other names for both functions
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _CopyWithSummedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SumWithIdentityBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: ARG004
        # HCCL and NCCL reduce contiguous tensors only
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None


class _GatherWithScatteredBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(value, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _scattered_sum(grads[0], ctx.group), None


class _SplitWithGatheredBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return value.chunk(group.size())[group.rank()].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gathered(grads[0], ctx.group), None


class _GatherWithSplitBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(value, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].chunk(ctx.group.size())[ctx.group.rank()].contiguous(), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


class _ScatteredSumWithGatheredBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scattered_sum(value, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gathered(grads[0], ctx.group), None


def _gathered(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    whole = value.new_empty(group.size() * value.shape[0], *value.shape[1:])
    _all_gather(whole, value.contiguous(), group=group)
    return whole


def _scattered_sum(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    part = value.new_empty(value.shape[0] // group.size(), *value.shape[1:])
    _reduce_scatter(part, value.contiguous(), group=group)
    return part


def _exchanged(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result


def split_along_first(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's equal part along the first axis; the backward is an all-gather of the gradient.

    Args:
        value: ``[group.size() * n, ...]``, replicated over ``group``.
        group: Ranks that take a part each.
    """
    if group.size() == 1:
        return value
    part: Tensor = _SplitWithGatheredBackward.apply(value, group)  # type: ignore[no-untyped-call]
    return part


def join_along_first(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The inverse of :func:`split_along_first`: an all-gather, for a result that every rank uses in the same way.

    The backward takes this rank's part of the gradient, which is the same on every rank.

    Args:
        value: This rank's part ``[n, ...]``; the same shape on every rank.
        group: Ranks that hold the parts.
    """
    if group.size() == 1:
        return value
    whole: Tensor = _GatherWithSplitBackward.apply(value, group)  # type: ignore[no-untyped-call]
    return whole


def exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all of rows; the backward is the all-to-all in the other direction.

    Args:
        rows: ``[sum(sent), ...]``: the rows for each rank, in rank order.
        sent: Number of rows for each rank.
        received: Number of rows from each rank.
        group: The ranks.

    Returns:
        ``[sum(received), ...]``: the rows from each rank, in rank order.
    """
    if group.size() == 1:
        return rows
    result: Tensor = _Exchange.apply(rows, sent, received, group)  # type: ignore[no-untyped-call]
    return result


def gather_along_first(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather along the first axis; the backward is a reduce-scatter (sum) of the gradient.

    Args:
        value: This rank's shard ``[n, ...]``; the same shape on every rank.
        group: Ranks that hold the shards.

    Returns:
        ``[group.size() * n, ...]``, the shards in rank order.
    """
    if group.size() == 1:
        return value
    whole: Tensor = _GatherWithScatteredBackward.apply(value, group)  # type: ignore[no-untyped-call]
    return whole


def scatter_sums_along_first(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Reduce-scatter (sum) along the first axis; the backward is an all-gather of the gradient.

    Args:
        value: This rank's summand ``[group.size() * n, ...]``.
        group: Ranks that hold the summands.

    Returns:
        ``[n, ...]``, this rank's shard of the sum.
    """
    if group.size() == 1:
        return value
    part: Tensor = _ScatteredSumWithGatheredBackward.apply(value, group)  # type: ignore[no-untyped-call]
    return part


def copy_to(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Identity; the backward is an all-reduce (sum) of the gradient.

    Use this function before a product with a sharded weight: each rank's backward then has only a part of
    ``dL/dvalue``.

    Args:
        value: Any shape; replicated over ``group``.
        group: Ranks that hold the shards of the weight.
    """
    if group.size() == 1:
        return value
    copied: Tensor = _CopyWithSummedBackward.apply(value, group)  # type: ignore[no-untyped-call]
    return copied


def sum_over(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-reduce (sum); the backward is the identity.

    Use this function where every rank of ``group`` computes the same loss from the sum and parameter gradients are
    summed over the group later: each rank then contributes ``dL/dvalue_r`` once.

    Args:
        value: Any shape; this rank's summand.
        group: Ranks that hold the summands.
    """
    if group.size() == 1:
        return value
    summed: Tensor = _SumWithIdentityBackward.apply(value, group)  # type: ignore[no-untyped-call]
    return summed


@contextmanager
def fail_together(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Run the body on every rank of ``group``; if it raises on any rank, every rank raises. A collective.

    Without this, the ranks whose body succeeds would wait in the next collective for the rank whose body raised.

    Args:
        group: The ranks; ``Groups.control`` where a body may take longer than a collective of training may. None in a
            process of its own.

    Raises:
        SimpoError: on every rank, the exception of the lowest failing rank. A failing rank raises an exception that is
            not a :class:`SimpoError` unchanged; the other ranks raise a :class:`SimpoError` with its type and message.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    report = own if own is None or isinstance(own, SimpoError) else SimpoError(f"{type(own).__name__}: {own}")
    reports = of_all_ranks(report, group)
    if own is not None and not isinstance(own, SimpoError):
        raise own
    for reported in reports:
        if reported is not None:
            reported.everywhere = True
            raise reported from None


def of_all_ranks(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """The value of each rank of ``group``, on every rank; a collective.

    Args:
        value: An object that pickle can copy.
        group: The ranks; None in a process of its own.
    """
    if group is None:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def of_first_rank(value: T, group: dist.ProcessGroup | None) -> T:
    """The value of the first rank of ``group``, on every rank; a collective. See :func:`of_all_ranks`."""
    return of_all_ranks(value, group)[0]
