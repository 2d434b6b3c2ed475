"""``two_pass`` under pipeline parallelism: pairs forward only, then chosen and rejected as micro-batches of their own.

With ``s_w, s_l`` the log-probability sums and L the mean loss of a micro-batch of pairs, the first sweep gives every
``dL/ds``; in the second, each half-size micro-batch carries its own. A stage then holds the activations of half the
rows. It costs one more forward of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mindspeed_simpo.integrations.mindspeed_llm.pairs import mean_loss, pair_inputs, row_tokens
from mindspeed_simpo.integrations.mindspeed_llm.report import Metrics, pair_metrics
from mindspeed_simpo.loss.scoring import LossOfPairs
from mindspeed_simpo.parallel import Groups

Batch = Mapping[str, Tensor]
Forward = Callable[[Iterator[Batch], torch.nn.Module], tuple[Tensor, Tensor]]
"""``forward(data_iterator, model)``: this stage's output for the next batch, and the targets of its rows."""
Logprobs = Callable[[Tensor, Tensor], Float[Tensor, " row"]]
"""``logprobs(output, targets)``: what the last stage's output says of each row's responses; nats."""


class Sweeps:
    """Runs a pipeline schedule twice for one iteration."""

    def __init__(self, forward: Forward, logprobs: Logprobs, objective: LossOfPairs, groups: Groups) -> None:
        self._forward = forward
        self._logprobs = logprobs
        self._objective = objective
        self._groups = groups
        self._row_grads: list[Float[Tensor, " row"]] = []

    def run(self, schedule: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """One iteration's gradients.

        Args:
            schedule: One of megatron's, for pipelines.
            arguments: What to call it with; ``micro_batch_size`` in rows of whole micro-batches.

        Returns:
            The micro-batches' metrics, on the last stage.
        """
        number, rows = arguments["num_microbatches"], arguments["micro_batch_size"]
        iterators = arguments["data_iterator"]
        # one iterator for each virtual stage
        each = iterators if isinstance(iterators, list) else [iterators]
        batches = [None if iterator is None else [next(iterator) for _ in range(number)] for iterator in each]

        def replay(part: Callable[[list[Batch]], Iterator[Batch]]) -> Any:
            replayed = [None if kept is None else part(kept) for kept in batches]
            return replayed if isinstance(iterators, list) else replayed[0]

        self._row_grads = []
        with torch.no_grad():
            metrics = schedule(
                **arguments
                | {"forward_step_func": self._scoring_step, "data_iterator": replay(iter), "forward_only": True}
            )
        schedule(
            **arguments
            | {"forward_step_func": self._training_step, "data_iterator": replay(_halves)}
            | {"num_microbatches": 2 * number, "micro_batch_size": rows // 2}
        )
        return metrics

    def _scoring_step(self, data_iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        output, targets = self._forward(data_iterator, model)
        return output, partial(self._score, targets)

    def _score(self, targets: Int[Tensor, "row seq"], output: Tensor) -> tuple[Tensor, Metrics]:
        sums = self._logprobs(output, targets).detach().requires_grad_()
        with torch.enable_grad():
            inputs = pair_inputs(sums, row_tokens(targets, self._groups))
            scored = self._objective(inputs)
            loss = mean_loss(scored)
        self._row_grads += torch.autograd.grad(loss, sums)[0].chunk(2)
        return loss.detach(), pair_metrics(inputs, scored, self._groups.data)

    def _training_step(self, data_iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        output, targets = self._forward(data_iterator, model)
        return output, partial(self._half_loss, targets)

    def _half_loss(self, targets: Int[Tensor, "row seq"], output: Tensor) -> tuple[Tensor, Metrics]:
        sums = self._logprobs(output, targets)
        # the schedule takes the mean over twice as many micro-batches as there are
        return 2 * (sums * self._row_grads.pop(0)).sum(), {}


def _halves(batches: list[Batch]) -> Iterator[Batch]:
    for batch in batches:
        for half in (0, 1):
            yield {name: rows.chunk(2)[half] for name, rows in batch.items()}
