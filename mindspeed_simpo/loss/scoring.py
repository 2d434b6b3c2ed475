"""From the log-probability sums of pairs to their loss, its metrics and its gradient by the two sums of each pair."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mindspeed_simpo.batch import LossInputs, LossOutput, PairBatch, RunningStatistics
from mindspeed_simpo.errors import ConfigError

LossOfPairs = Callable[[LossInputs], LossOutput]
"""Usually a :class:`~mindspeed_simpo.loss.pair_loss.PairLoss`."""
ReferenceLookup = Callable[[Int[Tensor, " pair"]], tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]]


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs with what the model and the objective say of them, without a graph."""

    inputs: LossInputs
    output: LossOutput


@dataclass(frozen=True)
class ScoredBatch(ScoredPairs):
    """The pairs of a micro-batch; exists on the last pipeline rank only."""

    batch: PairBatch


Record = TypeVar("Record", bound=ScoredPairs)


def score(loss: LossOfPairs, inputs: LossInputs) -> tuple[Float[Tensor, ""], ScoredPairs]:
    """Sum of the pairs' losses with its graph, and the pairs' record without one."""
    output = loss(inputs)
    detached = dataclasses.replace(
        inputs, chosen_logprob=inputs.chosen_logprob.detach(), rejected_logprob=inputs.rejected_logprob.detach()
    )
    return output.loss.sum(), ScoredPairs(detached, dataclasses.replace(output, loss=output.loss.detach()))


@torch.enable_grad()
def gradients(
    loss: LossOfPairs, inputs: LossInputs
) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"], ScoredPairs]:
    """``dL/ds_w`` and ``dL/ds_l`` with L the sum of the pairs' losses and ``s`` the two sums of each pair.

    Raises:
        ConfigError: where the loss depends on anything else that has a gradient.
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
    """The loss of a micro-batch's pairs, with what it needs beside the model's sums."""

    loss: LossOfPairs
    reference: ReferenceLookup | None = None
    """Sums under the reference model by ``pair_ids``, nats."""
    running: Callable[[], RunningStatistics | None] | None = None
    """Statistics of the objective's tracked value over the global batches so far."""

    def __call__(
        self, batch: PairBatch, chosen: Float[Tensor, " pair"], rejected: Float[Tensor, " pair"]
    ) -> tuple[Float[Tensor, ""], ScoredBatch]:
        """Sum of the pairs' losses with its graph, and the micro-batch's record without one.

        Args:
            batch: On the device of the sums.
            chosen: Sums of response-token log-probabilities, whole-sequence and whole-vocabulary, nats.
            rejected: See ``chosen``.
        """
        total, scored = score(self.loss, self._inputs(batch, chosen, rejected))
        return total, ScoredBatch(scored.inputs, scored.output, batch)

    def gradients(
        self, batch: PairBatch, chosen: Float[Tensor, " pair"], rejected: Float[Tensor, " pair"]
    ) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"], ScoredBatch]:
        """:func:`gradients` of the micro-batch, and its record; the arguments are those of a call."""
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
class LossInTwo(Generic[Record]):
    """Loss of pairs of which one sequence passes through the model after the other.

    With ``s`` the sums of the sequences and L the sum of the pairs' losses, the backward of the first half starts from
    ``weight * (s_first @ dL/ds_first)``, that of the second half from ``weight * (s_second @ dL/ds_second)``. The two
    together have the gradient of ``weight * L``, while one half's graph exists at a time. ``dL/ds`` needs all sums:
    those of the second half come from a forward without a graph before.
    """

    gradients: Callable[
        [Float[Tensor, " pair"], Float[Tensor, " pair"]],
        tuple[Float[Tensor, " pair"], Float[Tensor, " pair"], Record],
    ]
    """``gradients(chosen, rejected)``: see :func:`gradients`."""
    weight: float
    order: Int[Tensor, " sequence"]
    """Number of each sequence (chosen 0..P-1, then rejected P..2P-1), in the order in which they pass."""
    second: Float[Tensor, " pair"] | None
    """Sums of the second half from the forward without a graph; on the last pipeline rank only."""
    second_grad: Float[Tensor, " pair"] | None = None

    def of_first(self, first: Float[Tensor, " pair"]) -> tuple[Float[Tensor, ""], Record]:
        """What the backward of the first half starts from, and the record of the pairs."""
        assert self.second is not None
        passed = torch.cat([first.detach(), self.second])
        sums = torch.empty_like(passed).index_copy(0, self.order, passed)
        *grads, scored = self.gradients(*sums.chunk(2))
        first_grad, self.second_grad = torch.cat(grads)[self.order].chunk(2)
        return first @ (first_grad * self.weight), scored

    def of_second(self, second: Float[Tensor, " pair"]) -> tuple[Float[Tensor, ""], None]:
        """What the backward of the second half starts from; after :meth:`of_first`."""
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
