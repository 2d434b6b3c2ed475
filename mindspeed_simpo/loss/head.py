"""The response head: hidden states to log-probability sums of responses, under tensor and context parallelism.

Shape legend: ``row`` = rows of the model's input, ``seq`` = positions on this rank, ``sequence`` = what is scored: each
row, or all that a packed one holds, ``token`` = response tokens of them, ``chunk`` = some of these tokens, ``hidden`` =
model width, ``shard`` = this tensor-parallel rank's slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_simpo.batch import ScoredTokens
from mindspeed_simpo.parallel.collectives import copy_to, gather_along_first, sum_over

_ROWS_AT_ONCE = 8192
"""Rows of a weight gradient whose product is held before it is added to a wider accumulator."""


@dataclass(frozen=True)
class ResponseHead:
    r"""``sum_t log softmax(cap(W h_t))[y_t]`` over the response tokens of each sequence.

    Only hidden states that predict a response token reach the output weight, so no ``[seq, vocabulary]`` tensor of
    prompt or padding positions exists. ``cap(z) = softcap tanh(z / softcap)``, or ``z`` without a softcap.

    Chunked or not, the numbers are those of one formula: logits in the dtype of the hidden states, the rest in fp32,
    the parts of a token's log-probability and all sums in ``sum_dtype``.
    """

    tensor_group: dist.ProcessGroup
    """Ranks that hold equal shards of the vocabulary, in rank order."""
    context_group: dist.ProcessGroup
    """Ranks that hold different positions of each sequence."""
    vocab_size: int
    """Ids that exist; the padding of the output weight above them has probability zero."""
    sum_dtype: torch.dtype
    """fp64; fp32 where the device or its collectives have no fp64."""
    softcap: float | None = None
    chunk_tokens: int | None = None
    """Response tokens whose logits exist at one time, computed again in the backward; None keeps all logits."""
    sequence_parallel: bool = False
    """Whether the ranks of ``tensor_group`` hold different positions of the hidden states."""
    weight_grad_awaited: bool = True
    """Whether a hook waits for the weight's ``.grad``: DDP that overlaps its reduction with the backward. With chunks,
    zeros are then made for it, for the gradient itself goes to ``main_grad``; else no tensor of that size is made."""

    def __call__(
        self,
        hidden: Float[Tensor, "hidden_seq row hidden"],
        weight: Float[Tensor, "shard hidden"],
        scored: ScoredTokens,
    ) -> Float[Tensor, " sequence"]:
        """Score the responses.

        Args:
            hidden: Final hidden states, after the last norm, of this context-parallel rank's positions; with
                ``sequence_parallel`` only this tensor-parallel rank's part of them.
            weight: This rank's rows of the output embedding.
            scored: The response tokens that these positions predict, ids of the whole vocabulary; targets were shifted
                on the whole sequence before it was sliced. On the device of ``hidden``.

        Returns:
            Nats, in ``sum_dtype``, on every rank of both groups; 0 for a sequence without response tokens.
        """
        if self.sequence_parallel:
            hidden = gather_along_first(hidden, self.tensor_group)
        states = hidden.flatten(0, 1).index_select(0, scored.state)
        if not self.sequence_parallel:
            states = copy_to(states, self.tensor_group)
        logprobs = self.token_logprobs(states, weight, scored.target)
        return sequence_sums(logprobs, scored, self.context_group, self.sum_dtype)

    def token_logprobs(
        self,
        states: Float[Tensor, "token hidden"],
        weight: Float[Tensor, "shard hidden"],
        targets: Int[Tensor, " token"],
    ) -> Float[Tensor, " token"]:
        r"""``log softmax(cap(W h))[y]`` of each token, nats, in ``sum_dtype``.

        Forward communicates one MAX all-reduce of one number a token and one SUM of two; backward is
        ``onehot - softmax`` on each shard and communicates nothing. Targets are ids of the whole vocabulary, so no id
        is special. With chunks the weight gradient is summed in fp32, in ``weight.main_grad`` where megatron's DDP has
        made one.
        """
        if self.chunk_tokens is not None:
            logprobs: Tensor = _ChunkedLogprob.apply(states, weight, targets, self)  # type: ignore[no-untyped-call]
            return logprobs
        logits = torch.nn.functional.linear(states, weight).float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        existing = self.existing_rows(weight)
        if existing < weight.shape[0]:
            logits[:, existing:] = float("-inf")
        return logits_logprobs(logits, targets, self.tensor_group, self.sum_dtype)

    def existing_rows(self, weight: Float[Tensor, "shard hidden"]) -> int:
        """Rows of this rank's shard that are no padding."""
        first_id = self.tensor_group.rank() * weight.shape[0]
        return max(0, min(weight.shape[0], self.vocab_size - first_id))

    def logit_chunks(
        self, states: Float[Tensor, "token hidden"], weight: Float[Tensor, "shard hidden"]
    ) -> Iterator[tuple[slice, Float[Tensor, "chunk shard"]]]:
        """fp32 logits of each chunk of tokens before the softcap, in a buffer that the next chunk overwrites."""
        assert self.chunk_tokens is not None
        size = max(1, min(self.chunk_tokens, len(states)))
        buffer = states.new_empty(size, len(weight), dtype=torch.float32)
        for start in range(0, len(states), size):
            rows = states[start : start + size]
            logits = buffer[: len(rows)]
            if states.dtype == logits.dtype:
                torch.mm(rows, weight.t(), out=logits)
            else:
                logits.copy_(rows @ weight.t())
            yield slice(start, start + size), logits

    def cap_(self, logits: Float[Tensor, "token shard"], weight: Float[Tensor, "shard hidden"]) -> None:
        """In place: the softcap, and minus infinity for ids that do not exist."""
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        logits[:, self.existing_rows(weight) :] = float("-inf")

    def uncap_grad_(self, grad: Float[Tensor, "token shard"], logits: Float[Tensor, "token shard"]) -> None:
        """In place: the gradient by capped logits -> that by uncapped ones, ``grad (1 - tanh(z / softcap)^2)``."""
        if self.softcap is not None:
            grad.mul_(1 - torch.tanh(logits / self.softcap).square_())


def logits_logprobs(
    logits: Float[Tensor, "token shard"],
    targets: Int[Tensor, " token"],
    tensor_group: dist.ProcessGroup,
    sum_dtype: torch.dtype,
) -> Float[Tensor, " token"]:
    r"""``log softmax(logits)[y]`` with the vocabulary divided over ``tensor_group`` in equal shards, in rank order.

    Args:
        logits: fp32 or fp64, this rank's shard; minus infinity where an id does not exist.
        targets: Ids of the whole vocabulary.
        tensor_group: Ranks that hold the shards.
        sum_dtype: In which the parts of a log-probability are added.

    Returns:
        Nats, in ``sum_dtype``. Backward is ``onehot - softmax`` on each shard and communicates nothing.
    """
    logprobs: Tensor = _ShardLogprob.apply(logits, targets, tensor_group, sum_dtype)  # type: ignore[no-untyped-call]
    return logprobs


def sequence_sums(
    logprobs: Float[Tensor, " token"], scored: ScoredTokens, context_group: dist.ProcessGroup, sum_dtype: torch.dtype
) -> Float[Tensor, " sequence"]:
    """Sum of the tokens of each sequence, over all ranks of ``context_group``, on each of them.

    Args:
        logprobs: Of the tokens that ``scored`` names, in its order.
        scored: The tokens at this context-parallel rank's positions.
        context_group: Ranks that hold the other positions.
        sum_dtype: Of the sums.
    """
    by_position = logprobs.new_zeros(scored.num_sequences, scored.seq_length)
    by_position = by_position.index_put((scored.sequence, scored.place), logprobs)
    return sum_over(by_position.sum(dim=1, dtype=sum_dtype), context_group)


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
        owned = _Owned.of(local_targets, logits.shape[-1])
        exponentials, terms = _softmax_terms(logits, owned)
        logprobs, scale = _all_reduce_softmax(terms, owned, group, sum_dtype)
        ctx.save_for_backward(exponentials, scale, local_targets)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " token"]) -> tuple[Tensor, None, None, None]:
        exponentials, scale, local_targets = ctx.saved_tensors
        owned = _Owned.of(local_targets, exponentials.shape[-1])
        return _logit_grad(exponentials, scale, owned, grad.to(scale.dtype)), None, None, None


class _ChunkedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Float[Tensor, "token hidden"],
        weight: Float[Tensor, "shard hidden"],
        targets: Int[Tensor, " token"],
        head: ResponseHead,
    ) -> Float[Tensor, " token"]:
        local_targets = targets - head.tensor_group.rank() * len(weight)
        owned = _Owned.of(local_targets, len(weight))
        terms = states.new_empty(3, len(states), dtype=torch.float32)
        for tokens, logits in head.logit_chunks(states, weight):
            head.cap_(logits, weight)
            terms[:, tokens] = _softmax_terms(logits, owned.part(tokens), out=logits)[1]
        logprobs, scale = _all_reduce_softmax(terms, owned, head.tensor_group, head.sum_dtype)
        ctx.save_for_backward(states, weight, terms[0].clone(), scale, local_targets)
        # megatron's DDP marks the parameters whose main_grad it reduces
        ctx.main_grad = getattr(weight, "main_grad", None) if hasattr(weight, "grad_added_to_main_grad") else None
        ctx.head = head
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " token"]) -> tuple[Tensor | None, ...]:
        states, weight, local_max, scale, local_targets = ctx.saved_tensors
        head, owned, grad = ctx.head, _Owned.of(local_targets, len(weight)), grad.to(scale.dtype)
        needs_weight = ctx.needs_input_grad[1]
        states_grad = torch.empty_like(states)
        weight_grad = ctx.main_grad
        if needs_weight and weight_grad is None:
            weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        for tokens, logits in head.logit_chunks(states, weight):
            uncapped = logits.clone() if head.softcap is not None else logits
            head.cap_(logits, weight)
            exponentials = logits.sub_(local_max[tokens, None]).exp_()
            logit_grad = _logit_grad(exponentials, scale[tokens], owned.part(tokens), grad[tokens], out=exponentials)
            head.uncap_grad_(logit_grad, uncapped)
            logit_grad = logit_grad.to(states.dtype)
            torch.mm(logit_grad, weight, out=states_grad[tokens])
            if needs_weight:
                _add_product(weight_grad, logit_grad.t(), states[tokens])
        if needs_weight and ctx.main_grad is not None:
            weight_grad = torch.zeros_like(weight) if head.weight_grad_awaited else None
        elif needs_weight:
            weight_grad = weight_grad.to(weight.dtype)
        return states_grad, weight_grad if needs_weight else None, None, None


class _Owned(NamedTuple):
    """Which targets are in this rank's shard, and where."""

    column: Int[Tensor, "token 1"]
    """Index in the shard; 0 where the target is in another rank's."""
    mask: Bool[Tensor, " token"]

    @classmethod
    def of(cls, local_targets: Int[Tensor, " token"], shard: int) -> _Owned:
        mask = (local_targets >= 0) & (local_targets < shard)
        return cls(local_targets.where(mask, 0)[:, None], mask)

    def part(self, tokens: slice) -> _Owned:
        return _Owned(self.column[tokens], self.mask[tokens])


def _softmax_terms(
    logits: Float[Tensor, "token shard"], owned: _Owned, out: Float[Tensor, "token shard"] | None = None
) -> tuple[Float[Tensor, "token shard"], Float[Tensor, "3 token"]]:
    """``exp(logits - local_max)`` of one shard; by token ``local_max``, the exponentials' sum, the target's logit."""
    # a shard of nothing but padding has no maximum
    local_max = logits.amax(dim=-1).clamp_(min=torch.finfo(logits.dtype).min)
    target_logit = logits.gather(-1, owned.column)[:, 0]
    exponentials = torch.sub(logits, local_max[:, None], out=out).exp_()
    return exponentials, torch.stack([local_max, exponentials.sum(dim=-1), target_logit])


def _all_reduce_softmax(
    terms: Float[Tensor, "3 token"], owned: _Owned, group: dist.ProcessGroup, sum_dtype: torch.dtype
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """The target's log-probability over all shards, and what makes this shard's exponentials probabilities."""
    local_max, local_sum, target_logit = terms
    global_max = local_max.clone()
    dist.all_reduce(global_max, op=dist.ReduceOp.MAX, group=group)
    rescale = (local_max - global_max).exp_()
    reduced = torch.stack([local_sum * rescale, target_logit.where(owned.mask, 0.0)])
    dist.all_reduce(reduced, group=group)
    global_sum, target_logit = reduced
    # three numbers of different size: in fp32 their sum would be the least exact of all steps
    return target_logit.to(sum_dtype) - global_max - global_sum.to(sum_dtype).log(), rescale / global_sum


def _logit_grad(
    exponentials: Float[Tensor, "token shard"],
    scale: Float[Tensor, " token"],
    owned: _Owned,
    grad: Float[Tensor, " token"],
    out: Float[Tensor, "token shard"] | None = None,
) -> Float[Tensor, "token shard"]:
    """``grad (onehot - scale exponentials)``."""
    logit_grad = torch.mul(exponentials, (-grad * scale)[:, None], out=out)
    return logit_grad.scatter_add_(-1, owned.column, (grad * owned.mask)[:, None])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``; where ``total`` is wider, some rows at a time."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for rows, part in zip(torch.split(total, _ROWS_AT_ONCE), torch.split(left, _ROWS_AT_ONCE), strict=True):
        rows.add_(part @ right)
