"""``--pair-schedule two_pass``: chosen and rejected rows as micro-batches of their own, half the activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mindspeed_simpo.integrations.mindspeed_llm.pairs import pair_inputs, row_tokens
from mindspeed_simpo.integrations.mindspeed_llm.report import Metrics, reduced_metrics
from mindspeed_simpo.loss.scoring import LossOfPairs, ScoredPairs, TwoPassLoss, gradients
from mindspeed_simpo.parallel import Groups

Batch = Mapping[str, Tensor]
Forward = Callable[[Iterator[Batch], torch.nn.Module], tuple[Tensor, Tensor]]
"""``forward(data_iterator, model)``: this pipeline rank's output for the next batch, and the targets of its rows."""
Logprobs = Callable[[Tensor, Tensor], Float[Tensor, " row"]]
"""``logprobs(output, targets)``: the rows' log-probability sums from the last pipeline rank's output; nats."""
_RejectedSums = tuple[Float[Tensor, " pair"], Int[Tensor, " pair"]]
"""Log-probability sums and response tokens of the rejected rows of one micro-batch."""


class TwoPass:
    """Runs a schedule of Megatron-LM twice for one iteration, with or without pipeline parallelism.

    The first run is forward only, over the rejected rows. In the second run the chosen and the rejected rows of a
    micro-batch are two micro-batches, each with its loss from :class:`TwoPassLoss`, so gradient accumulation,
    pipelining and gradient synchronisation of Megatron-LM need no change. A pipeline rank stores the activations of
    half the rows, and computes one more forward of half the rows.
    """

    def __init__(self, forward: Forward, logprobs: Logprobs, objective: LossOfPairs, groups: Groups) -> None:
        self._forward = forward
        self._logprobs = logprobs
        self._objective = objective
        self._groups = groups
        self._rejected_sums: list[_RejectedSums] = []
        self._pending: TwoPassLoss[ScoredPairs] | None = None

    def run(self, schedule: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """One iteration's gradients.

        Args:
            schedule: A forward-backward schedule of Megatron-LM.
            arguments: Keyword arguments of ``schedule``; ``micro_batch_size`` counts chosen and rejected rows.

        Returns:
            The micro-batches' metrics, on the last pipeline rank.
        """
        number, rows = arguments["num_microbatches"], arguments["micro_batch_size"]
        iterators = arguments["data_iterator"]
        # one iterator for each virtual pipeline rank
        each = iterators if isinstance(iterators, list) else [iterators]
        batches = [None if iterator is None else [next(iterator) for _ in range(number)] for iterator in each]

        def replay(*halves: int) -> Any:
            replayed = [None if kept is None else _halves(kept, halves) for kept in batches]
            return replayed if isinstance(iterators, list) else replayed[0]

        halved = arguments | {"micro_batch_size": rows // 2}
        forward_only = {"forward_step_func": self._rejected_step, "data_iterator": replay(1), "forward_only": True}
        with torch.no_grad():
            self._rejected_sums = list(schedule(**halved | forward_only))
        training = {"forward_step_func": self._training_step, "data_iterator": replay(0, 1)}
        return schedule(**halved | training | {"num_microbatches": 2 * number})[::2]

    def _rejected_step(self, data_iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        output, targets = self._forward(data_iterator, model)
        return output, partial(self._sums_of_rejected, targets)

    def _sums_of_rejected(self, targets: Int[Tensor, "row seq"], output: Tensor) -> tuple[Tensor, _RejectedSums]:
        sums = self._logprobs(output, targets)
        return sums.sum(), (sums, row_tokens(targets, self._groups))

    def _training_step(self, data_iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        output, targets = self._forward(data_iterator, model)
        return output, partial(self._half_loss, targets)

    def _half_loss(self, targets: Int[Tensor, "row seq"], output: Tensor) -> tuple[Tensor, Metrics]:
        sums = self._logprobs(output, targets)
        if self._pending is not None:
            pending, self._pending = self._pending, None
            return pending.second_half(sums)[0], {}
        rejected, rejected_tokens = self._rejected_sums.pop(0)
        tokens = torch.cat([row_tokens(targets, self._groups), rejected_tokens])
        self._pending = TwoPassLoss(
            partial(self._gradients, tokens),
            # the mean over pairs, times 2 because the schedule takes the mean over twice as many micro-batches
            weight=2 / len(sums),
            order=torch.arange(len(tokens), device=tokens.device),
            second=rejected,
        )
        loss, scored = self._pending.first_half(sums)
        return loss, reduced_metrics(scored, self._groups.data)

    def _gradients(
        self, tokens: Int[Tensor, " row"], chosen: Float[Tensor, " pair"], rejected: Float[Tensor, " pair"]
    ) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"], ScoredPairs]:
        return gradients(self._objective, pair_inputs(torch.cat([chosen, rejected]), tokens))


def _halves(batches: list[Batch], halves: tuple[int, ...]) -> Iterator[Batch]:
    """Rows of the chosen (0) or rejected (1) responses of each micro-batch, in this order."""
    for batch in batches:
        for half in halves:
            yield {name: rows.chunk(2)[half] for name, rows in batch.items()}
