"""From upstream's batches to the inputs of an objective: shifted targets, log-probability sums, pairs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from megatron.core import mpu
from torch import Tensor

from mindspeed_simpo.batch import IGNORE_INDEX, ScoredTokens
from mindspeed_simpo.device import reduction_dtype
from mindspeed_simpo.integrations.mindspeed_llm import stages
from mindspeed_simpo.loss.head import sequence_sums
from mindspeed_simpo.loss.pair_loss import PairLoss
from mindspeed_simpo.loss.vocab_parallel import logits_logprobs
from mindspeed_simpo.losses import LossInputs
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import sum_over


class NextTokenLabels(Iterator[Mapping[str, Any]]):
    """Upstream's batches with shifted labels: ``labels[:, t]`` is the id that position t predicts.

    The labels are shifted on the full sequence, before upstream's ``get_batch`` slices labels and tokens over
    context-parallel ranks. Hence no label at the edge of a slice is lost or mismatched.
    """

    def __init__(self, batches: Iterator[Mapping[str, Any]]) -> None:
        self._batches = batches

    def __next__(self) -> Mapping[str, Any]:
        batch = dict(next(self._batches))
        batch["labels"] = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        return batch


def pair_batch(
    get_batch: Callable[..., Iterable[Any]], batches: Iterator[Mapping[str, Any]], args: Namespace
) -> list[Any]:
    """What upstream's ``get_batch`` returns, for next-token labels; in the causal ring without its mask.

    The NPU's operator refuses the mask of whole rows there; without a mask MindSpeed makes the causal one that the
    operator takes. Padding ends a row, so that it changes no token before.

    Args:
        get_batch: Of an upstream trainer; the mask is its last result but one.
        batches: Upstream's batches.
        args: Of the command line.
    """
    batch = list(get_batch(NextTokenLabels(batches)))
    ring = args.context_parallel_size > 1 and args.context_parallel_algo == "megatron_cp_algo"
    if ring and getattr(args, "attention_mask_type", "causal") == "causal":
        batch[-2] = None
    return batch


def pair_loss(args: Namespace) -> PairLoss:
    """The loss of the objective that the command line selects."""
    objective = stages.objective_of(args)
    assert objective is not None, "--stage is upstream's own"
    return PairLoss.of(stages.task_options(args, objective))


def upstream_groups() -> Groups:
    """The process groups that Megatron-LM has set up."""
    assert dist.group.WORLD is not None
    return Groups(
        world=dist.group.WORLD,
        tensor=mpu.get_tensor_model_parallel_group(),
        pipeline=mpu.get_pipeline_model_parallel_group(),
        context=mpu.get_context_parallel_group(),
        data=mpu.get_data_parallel_group(),
        control=dist.group.WORLD,
        saving=dist.group.WORLD,
    )


def row_logprobs(
    logits: Float[Tensor, "row seq shard"], targets: Int[Tensor, "row seq"], groups: Groups
) -> Float[Tensor, " row"]:
    """``sum_t log softmax(logits_t)[y_t]`` over the response tokens of each row, all-reduced over context ranks; nats.

    The softmax includes the padding of the vocabulary, as in upstream's own stages.
    """
    scored, sum_dtype = ScoredTokens.of(targets), reduction_dtype(logits.device)
    selected = logits[scored.sequence, scored.position].float()
    logprobs = logits_logprobs(selected, scored.target, groups.tensor, sum_dtype)
    return sequence_sums(logprobs, scored, groups.context, sum_dtype)


def row_tokens(targets: Int[Tensor, "row seq"], groups: Groups) -> Int[Tensor, " row"]:
    """int64 response tokens of each row, all-reduced over context-parallel ranks."""
    return sum_over((targets != IGNORE_INDEX).sum(dim=1), groups.context)


def pair_inputs(
    logprobs: Float[Tensor, " row"], tokens: Int[Tensor, " row"], reference: Float[Tensor, " row"] | None = None
) -> LossInputs:
    """Rows ``[chosen 0..n-1, rejected 0..n-1]`` as pairs."""
    (chosen, rejected), (chosen_tokens, rejected_tokens) = logprobs.chunk(2), tokens.chunk(2)
    references = reference.chunk(2) if reference is not None else (None, None)
    return LossInputs(chosen, rejected, chosen_tokens, rejected_tokens, *references)
