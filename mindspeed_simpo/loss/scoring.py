"""From the log-probability sums of pairs to the loss and to the gradient of the loss by the two sums of each pair."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mindspeed_simpo.batch import PairBatch
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.losses import LossInputs, LossOutput, RunningStatistics

LossOfPairs = Callable[[LossInputs], LossOutput]
"""Loss of each pair, usually a :class:`~mindspeed_simpo.loss.pair_loss.PairLoss`."""
ReferenceLookup = Callable[[Int[Tensor, " pair"]], tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]]
"""``pair_ids`` -> chosen and rejected sums under the reference model, nats."""


@dataclass(frozen=True)
class ScoredPairs:
    """Inputs and output of the loss of some pairs, detached."""

    inputs: LossInputs
    output: LossOutput


@dataclass(frozen=True)
class ScoredBatch(ScoredPairs):
    """Inputs and output of the loss of a micro-batch, detached; exists on the last pipeline rank only."""

    batch: PairBatch


Record = TypeVar("Record", bound=ScoredPairs)


def score(loss: LossOfPairs, inputs: LossInputs) -> tuple[Float[Tensor, ""], ScoredPairs]:
    """Sum of the pairs' losses with its graph, and the detached record."""
    output = loss(inputs)
    detached = dataclasses.replace(
        inputs, chosen_logprob=inputs.chosen_logprob.detach(), rejected_logprob=inputs.rejected_logprob.detach()
    )
    return output.loss.sum(), ScoredPairs(detached, dataclasses.replace(output, loss=output.loss.detach()))


@torch.enable_grad()
def gradients(
    loss: LossOfPairs, inputs: LossInputs
) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"], ScoredPairs]:
    """``dL/ds_w``, ``dL/ds_l`` and the detached record; L is the sum of the pairs' losses, ``s`` are the pairs' sums.

    Raises:
        ConfigError: where the loss depends on another tensor that requires a gradient.
    """
    sums = inputs.chosen_logprob.detach().requires_grad_(), inputs.rejected_logprob.detach().requires_grad_()
    total, scored = score(loss, dataclasses.replace(inputs, chosen_logprob=sums[0], rejected_logprob=sums[1]))
    if not _depends_only_on(total, sums):
        raise ConfigError(
            "pair_schedule: two_pass takes the loss's gradient by the two log-probability sums of each pair; this "
            "objective's loss depends on more than these: set pair_schedule: concat"
        )
    chosen_grad, rejected_grad = torch.autograd.grad(total, sums, allow_unused=True, materialize_grads=True)
    return chosen_grad, rejected_grad, scored


@dataclass(frozen=True)
class PairScorer:
    """The loss of a micro-batch from the model's sums, the reference sums and the running statistics."""

    loss: LossOfPairs
    reference: ReferenceLookup | None = None
    """Looks up the sums under the reference model; None without a reference model."""
    running: Callable[[], RunningStatistics | None] | None = None
    """Returns the statistics of the objective's tracked value over the previous global batches."""

    def __call__(
        self, batch: PairBatch, chosen: Float[Tensor, " pair"], rejected: Float[Tensor, " pair"]
    ) -> tuple[Float[Tensor, ""], ScoredBatch]:
        """Sum of the pairs' losses with its graph, and the detached record of the micro-batch.

        Args:
            batch: The micro-batch, on the device of the sums.
            chosen: Log-probability sums of the chosen responses, reduced over TP and CP, nats.
            rejected: Log-probability sums of the rejected responses, reduced over TP and CP, nats.
        """
        total, scored = score(self.loss, self._inputs(batch, chosen, rejected))
        return total, ScoredBatch(scored.inputs, scored.output, batch)

    def gradients(
        self, batch: PairBatch, chosen: Float[Tensor, " pair"], rejected: Float[Tensor, " pair"]
    ) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"], ScoredBatch]:
        """:func:`gradients` of the micro-batch.

        Args:
            batch: As in :meth:`__call__`.
            chosen: As in :meth:`__call__`.
            rejected: As in :meth:`__call__`.

        Raises:
            ConfigError: where the loss depends on another tensor that requires a gradient.
        """
        chosen_grad, rejected_grad, scored = gradients(self.loss, self._inputs(batch, chosen, rejected))
        return chosen_grad, rejected_grad, ScoredBatch(scored.inputs, scored.output, batch)

    def _inputs(self, batch: PairBatch, chosen: Float[Tensor, " pair"], rejected: Float[Tensor, " pair"]) -> LossInputs:
        chosen_tokens, rejected_tokens = batch.response_tokens.chunk(2)
        lookup = self.reference
        reference_chosen, reference_rejected = lookup(batch.pair_ids) if lookup is not None else (None, None)
        running = self.running() if self.running is not None else None
        return LossInputs(
            chosen, rejected, chosen_tokens, rejected_tokens, reference_chosen, reference_rejected, running
        )


@dataclass
class TwoPassLoss(Generic[Record]):
    """Loss of pairs whose two sequences are in two micro-batches, the first and the second half.

    With ``s`` the sums of the sequences and L the sum of the pairs' losses, the loss of the first half is
    ``weight * (s_first @ dL/ds_first)`` and that of the second half ``weight * (s_second @ dL/ds_second)``, with
    ``dL/ds`` constant. The gradients of both add up to the gradient of ``weight * L``, and only one half's graph exists
    at a time. ``dL/ds`` depends on all sums; those of the second half come from an earlier forward without a graph.
    """

    gradients: Callable[
        [Float[Tensor, " pair"], Float[Tensor, " pair"]],
        tuple[Float[Tensor, " pair"], Float[Tensor, " pair"], Record],
    ]
    """``gradients(chosen, rejected)`` -> ``dL/ds_w``, ``dL/ds_l`` and the detached record, as :func:`gradients`."""
    weight: float
    order: Int[Tensor, " sequence"]
    """Index (chosen 0..P-1, then rejected P..2P-1) of each sequence of the first half, then of the second half."""
    second: Float[Tensor, " pair"] | None
    """Sums of the second half from the forward without a graph; None except on the last pipeline rank."""
    second_grad: Float[Tensor, " pair"] | None = None
    """``dL/ds_second``; set by :meth:`first_half`."""

    def first_half(self, first: Float[Tensor, " pair"]) -> tuple[Float[Tensor, ""], Record]:
        """The loss of the first half with its graph, and the detached record of the pairs.

        Args:
            first: Sums of the first half, with their graph, nats.
        """
        assert self.second is not None
        passed = torch.cat([first.detach(), self.second])
        sums = torch.empty_like(passed).index_copy(0, self.order, passed)
        *grads, scored = self.gradients(*sums.chunk(2))
        first_grad, self.second_grad = torch.cat(grads)[self.order].chunk(2)
        return first @ (first_grad * self.weight), scored

    def second_half(self, second: Float[Tensor, " pair"]) -> tuple[Float[Tensor, ""], None]:
        """The loss of the second half with its graph; call after :meth:`first_half`.

        Args:
            second: Sums of the second half, with their graph, nats.
        """
        assert self.second_grad is not None
        return second @ (self.second_grad * self.weight), None


def _depends_only_on(loss: Tensor, leaves: Iterable[Tensor]) -> bool:
    known = {id(leaf) for leaf in leaves}
    nodes: list[Any] = [loss.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and id(node.variable) not in known:
            return False
        nodes += [parent for parent, _ in node.next_functions]
    return True
