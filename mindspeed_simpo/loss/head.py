"""The response head: hidden states to log-probability sums of responses, under tensor and context parallelism.

Shape legend: ``row`` = rows of the model's input, ``seq`` = positions on this rank, ``sequence`` = scored sequences
(one for each padded row, or all in a packed row), ``token`` = their response tokens, ``chunk`` = some of these tokens,
``hidden`` = model width, ``shard`` = this tensor-parallel rank's slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_simpo.batch import ScoredTokens
from mindspeed_simpo.device.compiled import as_one_kernel
from mindspeed_simpo.device.products import add_product
from mindspeed_simpo.loss.chunks import chunk_grads, chunk_terms
from mindspeed_simpo.loss.vocab_parallel import LocalTargets, all_reduce_softmax, logits_logprobs
from mindspeed_simpo.parallel.collectives import copy_to, gather_along_first, sum_over


@dataclass(frozen=True)
class ResponseHead:
    r"""``sum_t log softmax(cap(W h_t))[y_t]`` over the response tokens of each sequence.

    Only hidden states that predict a response token are multiplied by the output weight, so no logits of prompt or
    padding positions are computed. ``cap(z) = softcap tanh(z / softcap)``, or ``z`` without a softcap.

    With and without chunks the precision is the same: logits in the dtype of the hidden states, softmax in fp32, the
    terms of a token's log-probability and all sums in ``sum_dtype``.
    """

    tensor_group: dist.ProcessGroup
    """Ranks that hold equal shards of the vocabulary, in rank order."""
    context_group: dist.ProcessGroup
    """Ranks that hold different positions of each sequence."""
    vocab_size: int
    """Number of ids; rows of the output weight from this index on are padding, and their ids have probability 0."""
    sum_dtype: torch.dtype
    """fp64; fp32 where the device or its collectives have no fp64."""
    softcap: float | None = None
    """Soft cap of the logits; None for none."""
    chunk_tokens: int | None = None
    """Tokens in a chunk: logits exist for one chunk at a time and are recomputed in the backward. None stores the
    logits of all response tokens."""
    sequence_parallel: bool = False
    """Whether the ranks of ``tensor_group`` hold different positions of the hidden states."""
    weight_grad_awaited: bool = True
    """Whether a hook of DDP is called on the weight's ``.grad``, as with ``overlap_grad_reduce``. With chunks the
    gradient is accumulated in ``main_grad``; the backward then returns a tensor of zeros for the hook, else None."""

    def __call__(
        self,
        hidden: Float[Tensor, "hidden_seq row hidden"],
        weight: Float[Tensor, "shard hidden"],
        scored: ScoredTokens,
    ) -> Float[Tensor, " sequence"]:
        """Score the responses.

        Args:
            hidden: Hidden states after the last norm at this context-parallel rank's positions; with
                ``sequence_parallel`` only this tensor-parallel rank's shard of these positions.
            weight: This rank's rows of the output embedding.
            scored: The response tokens that this context-parallel rank's positions predict, with ids of the full
                vocabulary, on the device of ``hidden``. Targets were shifted before the sequence was sliced.

        Returns:
            Sums in nats, in ``sum_dtype``, on every rank of both groups; 0 for a sequence without response tokens.
        """
        if self.sequence_parallel:
            hidden = gather_along_first(hidden, self.tensor_group)
        states = predicting_states(hidden, scored)
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

        Forward: one MAX all-reduce of one number a token and one SUM all-reduce of two numbers a token. Backward:
        ``onehot - softmax`` on each shard, without communication. With chunks the weight gradient is accumulated in
        fp32, in ``weight.main_grad`` where megatron-core's DDP has allocated this buffer.

        Args:
            states: Hidden states that predict the tokens.
            weight: This rank's rows of the output embedding.
            targets: Ids of the full vocabulary; every id, 0 included, is a valid target.
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
        """Number of rows of this rank's shard that are not padding."""
        first_id = self.tensor_group.rank() * weight.shape[0]
        return max(0, min(weight.shape[0], self.vocab_size - first_id))

    def product_chunks(
        self, states: Float[Tensor, "token hidden"], weight: Float[Tensor, "shard hidden"]
    ) -> Iterator[tuple[slice, Float[Tensor, "chunk shard"]]]:
        """Yield each chunk of tokens with its logits before the softcap; the next chunk overwrites the buffer."""
        assert self.chunk_tokens is not None
        size = max(1, min(self.chunk_tokens, len(states)))
        buffer = states.new_empty(size, len(weight))
        for start in range(0, len(states), size):
            rows = states[start : start + size]
            yield slice(start, start + size), torch.mm(rows, weight.t(), out=buffer[: len(rows)])

    def cap_of(self, weight: Float[Tensor, "shard hidden"]) -> tuple[float | None, int | None]:
        """The softcap, and the number of rows of this rank's shard that are not padding, None for all."""
        existing = self.existing_rows(weight)
        return self.softcap, existing if existing < len(weight) else None


class _Predicting(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Float[Tensor, "state hidden"], state: Int[Tensor, " token"], token: Int[Tensor, "copy state"]
    ) -> Float[Tensor, "token hidden"]:
        ctx.save_for_backward(token)
        return states.index_select(0, state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "token hidden"]) -> tuple[Tensor, None, None]:
        (token,) = ctx.saved_tensors
        grads = torch.cat([grad, grad.new_zeros(1, grad.shape[1])])  # the last is that of no token
        total, *others = (grads.index_select(0, row) for row in token.unbind())
        for other in others:
            total.add_(other)
        return total, None, None


def predicting_states(hidden: Float[Tensor, "seq row hidden"], scored: ScoredTokens) -> Float[Tensor, "token hidden"]:
    """The hidden state that predicts each token.

    In the backward each hidden state takes the gradients of its tokens, two where it predicts the first tokens of both
    responses. The backward of an index would add the tokens' gradients to the states', one by one, by atomic additions.

    Args:
        hidden: Hidden states of the positions of ``scored``.
        scored: The tokens.
    """
    states: Tensor = _Predicting.apply(hidden.flatten(0, 1), scored.state, scored.token)  # type: ignore[no-untyped-call]
    return states


def sequence_sums(
    logprobs: Float[Tensor, " token"], scored: ScoredTokens, context_group: dist.ProcessGroup, sum_dtype: torch.dtype
) -> Float[Tensor, " sequence"]:
    """Log-probability sum of each sequence, all-reduced over ``context_group``; the all-reduce has identity backward.

    Args:
        logprobs: Log-probabilities of the tokens of ``scored``, in the same order.
        scored: The tokens at this context-parallel rank's positions.
        context_group: Ranks that hold the other positions.
        sum_dtype: The dtype of the sums.

    Returns:
        Nats, in ``sum_dtype``, on every rank of ``context_group``.
    """
    by_position = logprobs.new_zeros(scored.num_sequences, scored.seq_length)
    by_position = by_position.index_put((scored.sequence, scored.position), logprobs)
    return sum_over(by_position.sum(dim=1, dtype=sum_dtype), context_group)


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
        owned = LocalTargets.of(local_targets, len(weight))
        terms = states.new_empty(3, len(states), dtype=torch.float32)
        cap = head.cap_of(weight)
        for tokens, products in head.product_chunks(states, weight):
            terms[:, tokens] = as_one_kernel(chunk_terms, products, owned.column[tokens], *cap)
        logprobs, scale = all_reduce_softmax(terms, owned, head.tensor_group, head.sum_dtype)
        ctx.save_for_backward(states, weight, terms[0].clone(), scale, local_targets)
        # DDP sets this attribute on the parameters whose main_grad it reduces
        ctx.main_grad = getattr(weight, "main_grad", None) if hasattr(weight, "grad_added_to_main_grad") else None
        ctx.head = head
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " token"]) -> tuple[Tensor | None, ...]:
        states, weight, local_max, scale, local_targets = ctx.saved_tensors
        head, owned, grad = ctx.head, LocalTargets.of(local_targets, len(weight)), grad.to(scale.dtype)
        needs_weight = ctx.needs_input_grad[1]
        states_grad = torch.empty_like(states)
        weight_grad = ctx.main_grad
        if needs_weight and weight_grad is None:
            weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        cap = head.cap_of(weight)
        for tokens, products in head.product_chunks(states, weight):
            of_tokens = (each[tokens] for each in (*owned, local_max, scale, grad))
            grads = as_one_kernel(chunk_grads, products, *of_tokens, *cap)
            torch.mm(grads, weight, out=states_grad[tokens])
            if needs_weight:
                add_product(weight_grad, grads.t(), states[tokens])
        if needs_weight and ctx.main_grad is not None:
            weight_grad = torch.zeros_like(weight) if head.weight_grad_awaited else None
        elif needs_weight:
            weight_grad = weight_grad.to(weight.dtype)
        return states_grad, weight_grad if needs_weight else None, None, None
