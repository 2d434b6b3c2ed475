"""``log softmax(logits)[y]`` with the vocabulary sharded over tensor-parallel ranks: forward and backward.

Shape legend: ``token`` = scored tokens, ``shard`` = this rank's slice of the vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_simpo.loss.chunks import softmax_terms


def logits_logprobs(
    logits: Float[Tensor, "token shard"],
    targets: Int[Tensor, " token"],
    tensor_group: dist.ProcessGroup,
    sum_dtype: torch.dtype,
) -> Float[Tensor, " token"]:
    r"""``log softmax(logits)[y]``; the backward is ``onehot - softmax`` on each shard, without communication.

    Args:
        logits: fp32 or fp64, this rank's shard; minus infinity at padding ids.
        targets: Ids of the full vocabulary.
        tensor_group: Ranks that hold the equal shards, in rank order.
        sum_dtype: The dtype in which the terms of a log-probability are added.

    Returns:
        Nats, in ``sum_dtype``, on every rank of ``tensor_group``.
    """
    logprobs: Tensor = _ShardLogprob.apply(logits, targets, tensor_group, sum_dtype)  # type: ignore[no-untyped-call]
    return logprobs


class _ShardLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "token shard"],
        targets: Int[Tensor, " token"],
        group: dist.ProcessGroup,
        sum_dtype: torch.dtype,
    ) -> Float[Tensor, " token"]:
        local_targets = targets - group.rank() * logits.shape[-1]
        owned = LocalTargets.of(local_targets, logits.shape[-1])
        exponentials, terms = softmax_terms(logits, owned.column)
        logprobs, scale = all_reduce_softmax(terms, owned, group, sum_dtype)
        ctx.save_for_backward(exponentials, scale, local_targets)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " token"]) -> tuple[Tensor, None, None, None]:
        exponentials, scale, local_targets = ctx.saved_tensors
        owned, grad = LocalTargets.of(local_targets, exponentials.shape[-1]), grad.to(scale.dtype)
        logit_grad = exponentials * (-grad * scale)[:, None]
        return logit_grad.scatter_add_(-1, owned.column, (grad * owned.mask)[:, None]), None, None, None


class LocalTargets(NamedTuple):
    """The columns of this rank's shard that are targets."""

    column: Int[Tensor, "token 1"]
    """Column of the token's target; 0 where the target is in another rank's shard."""
    mask: Bool[Tensor, " token"]
    """Whether the token's target is in this rank's shard."""

    @classmethod
    def of(cls, local_targets: Int[Tensor, " token"], shard: int) -> LocalTargets:
        """From ``targets - first id of the shard``, and the number of columns of the shard."""
        mask = (local_targets >= 0) & (local_targets < shard)
        return cls(local_targets.where(mask, 0)[:, None], mask)


def all_reduce_softmax(
    terms: Float[Tensor, "3 token"], owned: LocalTargets, group: dist.ProcessGroup, sum_dtype: torch.dtype
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """Combine the terms of all shards: one MAX and one SUM all-reduce.

    Args:
        terms: Second result of :func:`~mindspeed_simpo.loss.chunks.softmax_terms`.
        owned: The targets in this rank's shard.
        group: Ranks that hold the shards.
        sum_dtype: The dtype in which the terms of a log-probability are added.

    Returns:
        The target's log-probability, nats, in ``sum_dtype``; and ``scale``, for which ``scale * exponentials`` are the
        softmax probabilities of this shard.
    """
    local_max, local_sum, target_logit = terms
    global_max = local_max.clone()
    dist.all_reduce(global_max, op=dist.ReduceOp.MAX, group=group)
    rescale = (local_max - global_max).exp_()
    reduced = torch.stack([local_sum * rescale, target_logit.where(owned.mask, 0.0)])
    dist.all_reduce(reduced, group=group)
    global_sum, target_logit = reduced
    # the terms differ in magnitude: in fp32 this sum would have the largest rounding error of all steps
    return target_logit.to(sum_dtype) - global_max - global_sum.to(sum_dtype).log(), rescale / global_sum
