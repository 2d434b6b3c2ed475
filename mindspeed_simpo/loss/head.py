"""Log-probabilities of responses, from hidden states, under tensor and context parallelism.

Shape legend: ``row`` = rows of the model's input, ``seq`` = positions on this rank, ``sequence`` = what is scored: each
row, or all that a packed one holds, ``token`` = response tokens of them,
``hidden`` = model width, ``shard`` = this tensor-parallel rank's slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_simpo.batch import ScoredTokens
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.device import reduction_dtype
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import copy_to, gather_along_first, sum_over

_ROWS_AT_ONCE = 8192
"""Rows of a weight gradient whose product is held before it is added to a wider accumulator."""


@dataclass(frozen=True)
class FusedHead:
    """Head and log-probability a chunk of tokens at a time: logits are never kept, the backward computes them again."""

    chunk_tokens: int
    """Response tokens whose logits exist at one time."""
    weight_grad_awaited: bool = True
    """Whether a hook waits for the weight's ``.grad``: DDP that overlaps its reduction with the backward. Zeros are
    then made for it, for the gradient itself goes to ``main_grad``; else no tensor of the weight's size is made."""


def fused_head(config: Config) -> FusedHead | None:
    """The head that ``fused_logprob`` and ``logprob_chunk_tokens`` ask for; None where logits are whole."""
    if not config.fused_logprob:
        return None
    return FusedHead(config.logprob_chunk_tokens, weight_grad_awaited=config.overlap_grad_reduce)


def sequence_logprobs(
    hidden: Float[Tensor, "hidden_seq row hidden"],
    weight: Float[Tensor, "shard hidden"],
    *,
    scored: ScoredTokens,
    groups: Groups,
    vocab_size: int,
    sequence_parallel: bool = False,
    fused: FusedHead | None = None,
) -> Float[Tensor, " sequence"]:
    r"""``sum_t log softmax(W h_t)[y_t]`` over the response tokens of each sequence.

    Only hidden states that predict a response token reach the head, so no ``[seq, vocabulary]`` tensor of prompt or
    padding positions exists.

    Args:
        hidden: Final hidden states, after the last norm, of this context-parallel rank's positions; with
            ``sequence_parallel`` only this tensor-parallel rank's part of them.
        weight: This rank's rows of the output embedding.
        scored: The response tokens that these positions predict, ids of the whole vocabulary; targets were shifted on
            the whole sequence before it was sliced. On the device of ``hidden``.
        groups: Sums run over ``groups.context``; the vocabulary is divided over ``groups.tensor``.
        vocab_size: Ids that exist; the padding above it has probability zero.
        sequence_parallel: Whether the ranks of ``groups.tensor`` hold different positions of ``hidden``.
        fused: Set where logits are to exist for a chunk of tokens only.

    Returns:
        Nats, summed in fp64 (fp32 on NPUs); 0 for a sequence without response tokens.
    """
    if sequence_parallel:
        hidden = gather_along_first(hidden, groups.tensor)
    selected = hidden.flatten(0, 1).index_select(0, scored.state)
    if not sequence_parallel:
        selected = copy_to(selected, groups.tensor)
    token_logprobs = vocab_parallel_logprobs(
        selected, weight, scored.target, groups=groups, vocab_size=vocab_size, fused=fused
    )
    spread = token_logprobs.new_zeros(scored.num_sequences, scored.seq_length)
    spread = spread.index_put((scored.sequence, scored.place), token_logprobs)
    return sum_over(spread.sum(dim=1, dtype=reduction_dtype(spread.device)), groups.context)


def vocab_parallel_logprobs(
    hidden: Float[Tensor, "token hidden"],
    weight: Float[Tensor, "shard hidden"],
    targets: Int[Tensor, " token"],
    *,
    groups: Groups,
    vocab_size: int,
    fused: FusedHead | None = None,
) -> Float[Tensor, " token"]:
    r"""``log softmax(W h)[y]`` with the vocabulary divided over ``groups.tensor``.

    Forward communicates one MAX all-reduce of one number a token and one SUM of two; backward is ``onehot - softmax``
    on each shard and communicates nothing. Targets are ids of the whole vocabulary, so no id is special.

    Fused or not, the numbers are those of one formula: logits in the dtype of ``hidden``, the rest in fp32. The fused
    weight gradient is summed over the chunks in fp32, in ``weight.main_grad`` where megatron's DDP has made one.

    Returns:
        Nats, fp64 (fp32 on NPUs).
    """
    first_id = groups.tensor.rank() * weight.shape[0]
    existing = max(0, min(weight.shape[0], vocab_size - first_id))
    if fused is not None:
        logprobs: Tensor = _FusedLogprob.apply(  # type: ignore[no-untyped-call]
            hidden, weight, targets - first_id, groups.tensor, existing, fused
        )
        return logprobs
    logits = torch.nn.functional.linear(hidden, weight).float()
    if existing < weight.shape[0]:
        logits[:, existing:] = float("-inf")
    return logits_logprobs(logits, targets, groups.tensor)


def logits_logprobs(
    logits: Float[Tensor, "token shard"], targets: Int[Tensor, " token"], tensor_group: dist.ProcessGroup
) -> Float[Tensor, " token"]:
    r"""``log softmax(logits)[y]`` with the vocabulary divided over ``tensor_group`` in equal shards, in rank order.

    Args:
        logits: fp32 or fp64, this rank's shard; minus infinity where an id does not exist.
        targets: Ids of the whole vocabulary.
        tensor_group: Ranks that hold the shards.

    Returns:
        Nats, fp64 (fp32 on NPUs). Backward is ``onehot - softmax`` on each shard and communicates nothing.
    """
    first_id = tensor_group.rank() * logits.shape[-1]
    logprobs: Tensor = _ShardLogprob.apply(logits, targets - first_id, tensor_group)  # type: ignore[no-untyped-call]
    return logprobs


class _ShardLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Float[Tensor, "token shard"], targets: Int[Tensor, " token"], group: dist.ProcessGroup
    ) -> Float[Tensor, " token"]:
        exponentials, sums = _exponentials(logits, targets)
        logprobs, scale = _over_shards(sums, _within(targets, logits.shape[-1])[1], group)
        ctx.save_for_backward(exponentials, targets, scale)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " token"]) -> tuple[Tensor, None, None]:
        exponentials, targets, scale = ctx.saved_tensors
        return _logit_grad(exponentials, targets, scale, grad.to(scale.dtype)), None, None


class _FusedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "token hidden"],
        weight: Float[Tensor, "shard hidden"],
        targets: Int[Tensor, " token"],
        group: dist.ProcessGroup,
        existing: int,
        fused: FusedHead,
    ) -> Float[Tensor, " token"]:
        sums = hidden.new_empty(3, len(hidden), dtype=torch.float32)
        for tokens, logits in _logit_chunks(hidden, weight, existing, fused.chunk_tokens):
            sums[:, tokens] = _exponentials(logits, targets[tokens], out=logits)[1]
        logprobs, scale = _over_shards(sums, _within(targets, len(weight))[1], group)
        ctx.save_for_backward(hidden, weight, targets, sums[0].clone(), scale)
        # megatron's DDP marks the parameters whose main_grad it reduces
        ctx.main_grad = getattr(weight, "main_grad", None) if hasattr(weight, "grad_added_to_main_grad") else None
        ctx.existing, ctx.fused = existing, fused
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " token"]) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, maximum, scale = ctx.saved_tensors
        grad = grad.to(scale.dtype)
        needs_weight = ctx.needs_input_grad[1]
        hidden_grad = torch.empty_like(hidden)
        weight_grad = ctx.main_grad
        if needs_weight and weight_grad is None:
            weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        for tokens, logits in _logit_chunks(hidden, weight, ctx.existing, ctx.fused.chunk_tokens):
            exponentials = logits.sub_(maximum[tokens, None]).exp_()
            logit_grad = _logit_grad(exponentials, targets[tokens], scale[tokens], grad[tokens], out=exponentials)
            logit_grad = logit_grad.to(hidden.dtype)
            torch.mm(logit_grad, weight, out=hidden_grad[tokens])
            if needs_weight:
                _add_product(weight_grad, logit_grad.t(), hidden[tokens])
        if needs_weight and ctx.main_grad is not None:
            weight_grad = torch.zeros_like(weight) if ctx.fused.weight_grad_awaited else None
        elif needs_weight:
            weight_grad = weight_grad.to(weight.dtype)
        return hidden_grad, weight_grad if needs_weight else None, None, None, None, None


def _logit_chunks(
    hidden: Float[Tensor, "token hidden"], weight: Float[Tensor, "shard hidden"], existing: int, chunk_tokens: int
) -> Iterator[tuple[slice, Float[Tensor, "chunk shard"]]]:
    """fp32 logits of each chunk of tokens, in a buffer that the next chunk overwrites."""
    size = max(1, min(chunk_tokens, len(hidden)))
    buffer = hidden.new_empty(size, len(weight), dtype=torch.float32)
    for start in range(0, len(hidden), size):
        rows = hidden[start : start + size]
        logits = buffer[: len(rows)]
        if hidden.dtype == logits.dtype:
            torch.mm(rows, weight.t(), out=logits)
        else:
            logits.copy_(rows @ weight.t())
        logits[:, existing:] = float("-inf")
        yield slice(start, start + size), logits


def _exponentials(
    logits: Float[Tensor, "token shard"],
    targets: Int[Tensor, " token"],
    out: Float[Tensor, "token shard"] | None = None,
) -> tuple[Float[Tensor, "token shard"], Float[Tensor, "3 token"]]:
    """``exp(logits - maximum)`` of one shard; by token that maximum, the exponentials' sum and the target's logit."""
    # a shard of nothing but padding has no maximum
    maximum = logits.amax(dim=-1).clamp_(min=torch.finfo(logits.dtype).min)
    at_target = logits.gather(-1, _within(targets, logits.shape[-1])[0])[:, 0]
    exponentials = torch.sub(logits, maximum[:, None], out=out).exp_()
    return exponentials, torch.stack([maximum, exponentials.sum(dim=-1), at_target])


def _over_shards(
    sums: Float[Tensor, "3 token"], mine: Bool[Tensor, " token"], group: dist.ProcessGroup
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """What all shards say together: the target's log-probability, and what makes exponentials probabilities."""
    maximum, total, at_target = sums
    highest = maximum.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    rescale = (maximum - highest).exp_()
    reduced = torch.stack([total * rescale, at_target.where(mine, 0.0)])
    dist.all_reduce(reduced, group=group)
    normaliser, at_target = reduced
    # three numbers of different size: in fp32 their sum would be the least exact of all steps
    wide = reduction_dtype(total.device)
    return at_target.to(wide) - highest - normaliser.to(wide).log(), rescale / normaliser


def _logit_grad(
    exponentials: Float[Tensor, "token shard"],
    targets: Int[Tensor, " token"],
    scale: Float[Tensor, " token"],
    grad: Float[Tensor, " token"],
    out: Float[Tensor, "token shard"] | None = None,
) -> Float[Tensor, "token shard"]:
    """``grad (onehot - scale exponentials)``."""
    index, mine = _within(targets, exponentials.shape[-1])
    result = torch.mul(exponentials, (-grad * scale)[:, None], out=out)
    return result.scatter_add_(-1, index, (grad * mine)[:, None])


def _within(targets: Int[Tensor, " token"], shard: int) -> tuple[Int[Tensor, "token 1"], Bool[Tensor, " token"]]:
    """Index of each target in the shard, 0 where it is another shard's, and whether it is this one's."""
    mine = (targets >= 0) & (targets < shard)
    return targets.where(mine, 0)[:, None], mine


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``; where ``total`` is wider, some rows at a time."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for rows, part in zip(torch.split(total, _ROWS_AT_ONCE), torch.split(left, _ROWS_AT_ONCE), strict=True):
        rows.add_(part @ right)
