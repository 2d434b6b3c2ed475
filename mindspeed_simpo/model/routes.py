"""The rows that tokens become on their way to experts: their order, and copies with a backward of their own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function


class Routes(NamedTuple):
    """The rows that a rank sends, in the order of the ranks and experts that they go to.

    With several ranks to an expert, each of them gets a copy of the rows of the expert.
    """

    token: Int[Tensor, " row"]
    """Number of the token of each row."""
    copy: Int[Tensor, " row"]
    """Index of each row in ``place``, flat."""
    place: Int[Tensor, "token copies"]
    """The rows of each token: expert by expert as chosen, and rank by rank of the expert."""
    counts: Int[Tensor, " expert"]
    """Number of tokens of each expert."""


def within_groups(choice: Float[Tensor, "token expert"], groups: int, top_groups: int) -> Float[Tensor, "token expert"]:
    """``choice``, and minus infinity for experts outside of the token's best groups.

    The groups are of consecutive experts; the best are those with the highest sums of their two highest scores.

    Args:
        choice: Scores of the experts.
        groups: Number of groups.
        top_groups: Number of groups in which a token may choose experts.
    """
    of_groups = choice.view(len(choice), groups, -1)
    best = of_groups.topk(2, dim=-1).values.sum(-1).topk(top_groups, dim=-1).indices
    outside = torch.ones_like(of_groups[..., 0], dtype=torch.bool).scatter_(1, best, False)
    within: Tensor = of_groups.masked_fill(outside[..., None], -torch.inf).flatten(1)
    return within


def routes_of(chosen: Int[Tensor, "token k"], number: int, held: int, tensor_ranks: int) -> Routes:
    """The order in which the rows of the chosen experts are sent.

    Args:
        chosen: Numbers of the experts of each token.
        number: Number of experts.
        held: Number of experts of one rank.
        tensor_ranks: Number of ranks that divide each expert.
    """
    flat = chosen.flatten()
    ids, order = flat.sort(stable=True)
    sorted_place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    stops = torch.searchsorted(ids, torch.arange(number, device=ids.device), right=True)
    counts = stops.diff(prepend=stops.new_zeros(1))
    place = sorted_place[:, None]
    if tensor_ranks > 1:
        sizes = counts.view(-1, held).sum(1)
        owner = flat // held
        start = (sizes.cumsum(0) - sizes)[owner]
        copies = torch.arange(tensor_ranks, device=flat.device)
        place = (sorted_place + (tensor_ranks - 1) * start)[:, None] + copies * sizes[owner][:, None]
    copy = place.flatten().argsort()
    return Routes(copy // (chosen.shape[1] * tensor_ranks), copy, place.view(len(chosen), -1), counts)


class _Take(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        parts = grads[0].index_select(0, places.flatten())
        return parts.view(*places.shape, -1).sum(1), None, None


def take(
    values: Float[Tensor, "value hidden"], index: Int[Tensor, " row"], places: Int[Tensor, "value copies"]
) -> Float[Tensor, "row hidden"]:
    """``values[index]``, where ``places`` has the rows of the result that are copies of each value.

    The backward sums these rows; that of an index would add up one by one, by atomic additions.
    """
    rows: Tensor = _Take.apply(values, index, places)  # type: ignore[no-untyped-call]
    return rows
