"""From the log-probability sums of a micro-batch's rows to its loss, its metrics and the loss's gradient by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mindspeed_simpo.batch import LossInputs, LossOutput, PairBatch, RunningStatistics
from mindspeed_simpo.errors import ConfigError

LossOfPairs = Callable[[LossInputs], LossOutput]
"""Usually a :class:`~mindspeed_simpo.loss.pair_loss.PairLoss`."""
ReferenceLookup = Callable[[Int[Tensor, " pair"]], tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]]


@dataclass(frozen=True)
class ScoredBatch:
    """A micro-batch with what the model says of it; exists on the last pipeline stage only."""

    batch: PairBatch
    inputs: LossInputs
    output: LossOutput


@dataclass(frozen=True)
class PairScorer:
    """The loss of pairs, with what it needs beside the model's sums."""

    loss: LossOfPairs
    reference: ReferenceLookup | None = None
    """Sums under the reference model by ``pair_ids``, nats."""
    running: Callable[[], RunningStatistics | None] | None = None
    """Statistics of the objective's tracked value over the global batches so far."""

    def __call__(
        self, batch: PairBatch, chosen: Float[Tensor, " pair"], rejected: Float[Tensor, " pair"]
    ) -> tuple[Tensor, ScoredBatch]:
        """Sum of the pairs' losses with its graph, and the micro-batch's record without one.

        Args:
            batch: On the device of the sums.
            chosen: Sums of response-token log-probabilities, whole-sequence and whole-vocabulary, nats.
            rejected: See ``chosen``.
        """
        chosen_tokens, rejected_tokens = batch.response_tokens.chunk(2)
        lookup = self.reference
        reference_chosen, reference_rejected = lookup(batch.pair_ids) if lookup is not None else (None, None)
        running = self.running() if self.running is not None else None
        inputs = LossInputs(
            chosen, rejected, chosen_tokens, rejected_tokens, reference_chosen, reference_rejected, running
        )
        detached = dataclasses.replace(inputs, chosen_logprob=chosen.detach(), rejected_logprob=rejected.detach())
        output = self.loss(inputs)
        return output.loss.sum(), ScoredBatch(batch, detached, output)

    @torch.enable_grad()
    def gradients(
        self, batch: PairBatch, chosen: Float[Tensor, " pair"], rejected: Float[Tensor, " pair"]
    ) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"], ScoredBatch]:
        """``dL/dchosen`` and ``dL/drejected`` of the sum of the pairs' losses, and the micro-batch's record.

        Raises:
            ConfigError: where the loss depends on anything else that has a gradient.
        """
        sums = chosen.detach().requires_grad_(), rejected.detach().requires_grad_()
        loss, scored = self(batch, *sums)
        if not _depends_only_on(loss, sums):
            raise ConfigError(
                "pair_schedule: two_pass takes the loss's gradient by the two log-probability sums of each pair; this "
                "objective's loss depends on more than these: set pair_schedule: concat"
            )
        chosen_grad, rejected_grad = torch.autograd.grad(loss, sums, allow_unused=True, materialize_grads=True)
        return chosen_grad, rejected_grad, scored


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
