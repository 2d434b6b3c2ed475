"""The three pair schedules, as passes of rows through megatron-core's forward-backward schedules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from mindspeed_simpo.batch import PairBatch, to_device
from mindspeed_simpo.loss.head import ResponseHead
from mindspeed_simpo.loss.scoring import PairScorer, ScoredBatch, TwoPassLoss
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.training.schedule.rows import Rows, RowShard

PairScheduleName = Literal["concat", "split", "two_pass"]
LossOfPass = Callable[[Float[Tensor, " sequence"]], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Pass:
    """One forward, and where gradients are wanted one backward, of some rows through the whole pipeline."""

    rows: Rows
    loss: LossOfPass
    """On the last stage: the sequences' log-probability sums -> what the backward starts from, and a record."""


@dataclass(frozen=True)
class PairSchedule:
    """Runs micro-batches through the model, forward only or with gradients.

    The loss is ``sum over pairs / num_pairs`` of the global batch: its gradient is the same whatever the micro-batch
    size, the data-parallel degree and the way of the pairs through the model:

    - ``concat``: one forward of all rows, one backward.
    - ``split``: a forward of the chosen rows, a forward of the rejected rows, one joint backward. Both graphs live
      until then, so it stores what ``concat`` stores.
    - ``two_pass``: one sequence of each pair, the rejected one of padded rows, once without a graph; then a forward of
      the others, the loss, their backward, and forward and backward of the first ones. Half the stored activations for
      one more forward of half the rows. Each half is a micro-batch of its own to megatron-core, whose accumulation,
      pipelining and gradient synchronisation then hold as they are. Without dropout both forwards are the same.
    """

    models: Sequence[torch.nn.Module]
    """Pipeline chunks of this rank, wrapped in DDP where gradients are wanted."""
    scorer: PairScorer
    head: ResponseHead
    groups: Groups
    device: torch.device
    pair_schedule: PairScheduleName = "concat"

    def forward_backward(self, micro_batches: Sequence[PairBatch], num_pairs: int) -> list[ScoredBatch]:
        """Leave the gradient of the global batch's mean loss in ``main_grad``, reduced over all ranks.

        Args:
            micro_batches: This rank's share of the global batch.
            num_pairs: Pairs of the whole global batch, over all ranks.

        Raises:
            ConfigError: see :meth:`PairScorer.gradients`; ``two_pass`` only.
        """
        # DDP divides the gradient by the data-parallel size
        weight = self.groups.data.size() / num_pairs
        if self.pair_schedule == "two_pass":
            return self._two_pass(micro_batches, weight)
        return self._run(self._joint_passes(micro_batches, weight), forward_only=False)

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[PairBatch]) -> list[ScoredBatch]:
        """Score micro-batches without gradients."""
        return self._run(self._joint_passes(micro_batches, 1.0), forward_only=True)

    def _joint_passes(self, micro_batches: Sequence[PairBatch], weight: float) -> list[Pass]:
        return [Pass(Rows.of(batch), partial(self._joint_loss, batch, weight)) for batch in micro_batches]

    def _joint_loss(
        self, batch: PairBatch, weight: float, logprobs: Float[Tensor, " sequence"]
    ) -> tuple[Tensor, ScoredBatch]:
        loss, scored = self.scorer(batch.to(self.device), *logprobs.chunk(2))
        return loss * weight, scored

    def _two_pass(self, micro_batches: Sequence[PairBatch], weight: float) -> list[ScoredBatch]:
        halves = [Rows.of(batch).two_pass_halves(batch.lengths, self._sequence_multiple) for batch in micro_batches]
        with torch.no_grad():
            # the schedule returns the sums on the last pipeline rank, and nothing on the others
            swept = self._run([Pass(second.rows, _record) for _, second in halves], forward_only=True)
        passes = []
        for index, (batch, (first, second)) in enumerate(zip(micro_batches, halves, strict=True)):
            order = to_device(torch.cat([first.sequences, second.sequences]), self.device)
            loss = TwoPassLoss(partial(self._gradients, batch), weight, order, swept[index] if swept else None)
            passes += [Pass(first.rows, loss.first_half), Pass(second.rows, loss.second_half)]
        return self._run(passes, forward_only=False)[::2]

    def _gradients(
        self, batch: PairBatch, chosen: Float[Tensor, " pair"], rejected: Float[Tensor, " pair"]
    ) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"], ScoredBatch]:
        return self.scorer.gradients(batch.to(self.device), chosen, rejected)

    def _run(self, passes: Sequence[Pass], *, forward_only: bool) -> list[Any]:
        if len(self.models) > 1:
            # the interleaved schedule exchanges tensors of one shape
            longest = max(each.rows.tokens.shape[1] for each in passes)
            passes = [dataclasses.replace(each, rows=each.rows.padded_to(longest)) for each in passes]
        # response tokens are searched on the host: nonzero() on the device forces a host synchronisation
        steps = [(self._held(each.rows, forward_only), each.loss) for each in passes]
        return get_forward_backward_func()(  # type: ignore[no-any-return]
            forward_step_func=partial(self._forward_step, len(passes)),
            data_iterator=[iter(steps) for _ in self.models],
            model=list(self.models),
            num_microbatches=len(passes),
            seq_length=passes[0].rows.tokens.shape[1],
            micro_batch_size=passes[0].rows.tokens.shape[0],
            forward_only=forward_only,
        )

    def _held(self, rows: Rows, forward_only: bool) -> list[RowShard]:
        """What this rank's forwards of one pass take: one forward, or one of each half."""
        context = self.groups.context
        apart = self.pair_schedule == "split" and not forward_only
        return [part.shard_of(context.rank(), context.size()) for part in (rows.halves() if apart else (rows,))]

    def _forward_step(
        self, num_passes: int, steps: Iterator[tuple[list[RowShard], LossOfPass]], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Any]]]:
        parts, loss_of_pass = next(steps)
        parts = [part.to(self.device) for part in parts]
        output = self._score(model, parts[0]) if len(parts) == 1 else self._score_apart(model, parts)

        def loss(logprobs: Float[Tensor, " sequence"]) -> tuple[Tensor, Any]:
            value, record = loss_of_pass(logprobs)
            # the schedule divides each loss by their number
            return value * num_passes, record

        return output, loss

    def _score(self, model: torch.nn.Module, rows: RowShard) -> Tensor:
        """Log-probability sums of the sequences on the last stage, hidden states ``[seq, row, hidden]`` before it."""
        head = partial(self.head, scored=rows.scored)
        output: Tensor = model(
            rows.tokens, position_ids=rows.position_ids, documents=rows.documents, lengths=rows.lengths, head=head
        )
        return output

    def _score_apart(self, model: torch.nn.Module, parts: Sequence[RowShard]) -> Tensor:
        """:meth:`_score` of each part; what travels between stages is laid together as one forward's would be."""
        received = get_attr_wrapped_model(model, "decoder").input_tensor
        inputs = [None] * len(parts) if received is None else received.chunk(len(parts), dim=1)
        outputs = []
        for part, hidden in zip(parts, inputs, strict=True):
            if hidden is not None:
                get_attr_wrapped_model(model, "set_input_tensor")(hidden.contiguous())
            outputs.append(self._score(model, part))
        return torch.cat(outputs, dim=outputs[0].dim() // 2)

    @property
    def _sequence_multiple(self) -> int:
        tensor = self.groups.tensor.size() if self.head.sequence_parallel else 1
        context = self.groups.context.size()
        return tensor * (2 * context if context > 1 else 1)


def _record(logprobs: Float[Tensor, " sequence"]) -> tuple[Tensor, Float[Tensor, " sequence"]]:
    return logprobs.sum(), logprobs
