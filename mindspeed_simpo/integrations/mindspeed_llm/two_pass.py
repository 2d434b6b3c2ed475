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
_Swept = tuple[Float[Tensor, " pair"], Int[Tensor, " pair"]]
"""Log-probability sums and response tokens of the rejected rows of one micro-batch."""


class TwoPass:
    """Runs a schedule of megatron's twice for one iteration, with or without a pipeline.

    The first run takes the rejected rows forward only. In the second, chosen and rejected rows follow each other as
    micro-batches of their own, each with its part of the loss's gradient: megatron's accumulation, pipelining and
    gradient synchronisation then hold as they are. A pipeline rank stores the activations of half the rows, for one
    more forward of half the rows.
    """

    def __init__(self, forward: Forward, logprobs: Logprobs, objective: LossOfPairs, groups: Groups) -> None:
        self._forward = forward
        self._logprobs = logprobs
        self._objective = objective
        self._groups = groups
        self._swept: list[_Swept] = []
        self._begun: TwoPassLoss[ScoredPairs] | None = None

    def run(self, schedule: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """One iteration's gradients.

        Args:
            schedule: One of megatron's.
            arguments: What to call it with; ``micro_batch_size`` in rows of whole micro-batches.

        Returns:
            The micro-batches' metrics, on the last pipeline rank.
        """
        number, rows = arguments["num_microbatches"], arguments["micro_batch_size"]
        iterators = arguments["data_iterator"]
        # one iterator for each virtual pipeline chunk
        each = iterators if isinstance(iterators, list) else [iterators]
        batches = [None if iterator is None else [next(iterator) for _ in range(number)] for iterator in each]

        def replay(*halves: int) -> Any:
            replayed = [None if kept is None else _halves(kept, halves) for kept in batches]
            return replayed if isinstance(iterators, list) else replayed[0]

        halved = arguments | {"micro_batch_size": rows // 2}
        sweep = {"forward_step_func": self._sweep_step, "data_iterator": replay(1), "forward_only": True}
        with torch.no_grad():
            self._swept = list(schedule(**halved | sweep))
        training = {"forward_step_func": self._training_step, "data_iterator": replay(0, 1)}
        return schedule(**halved | training | {"num_microbatches": 2 * number})[::2]

    def _sweep_step(self, data_iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        output, targets = self._forward(data_iterator, model)
        return output, partial(self._sweep_sums, targets)

    def _sweep_sums(self, targets: Int[Tensor, "row seq"], output: Tensor) -> tuple[Tensor, _Swept]:
        sums = self._logprobs(output, targets)
        return sums.sum(), (sums, row_tokens(targets, self._groups))

    def _training_step(self, data_iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        output, targets = self._forward(data_iterator, model)
        return output, partial(self._half_loss, targets)

    def _half_loss(self, targets: Int[Tensor, "row seq"], output: Tensor) -> tuple[Tensor, Metrics]:
        sums = self._logprobs(output, targets)
        if self._begun is not None:
            begun, self._begun = self._begun, None
            return begun.second_half(sums)[0], {}
        rejected, rejected_tokens = self._swept.pop(0)
        tokens = torch.cat([row_tokens(targets, self._groups), rejected_tokens])
        self._begun = TwoPassLoss(
            partial(self._gradients, tokens),
            # a mean over pairs, where the schedule takes the mean over twice as many micro-batches
            weight=2 / len(sums),
            order=torch.arange(len(tokens), device=tokens.device),
            second=rejected,
        )
        loss, scored = self._begun.first_half(sums)
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
