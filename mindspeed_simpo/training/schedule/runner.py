"""The three pair schedules, as passes of an engine: forwards and, with gradients, backwards of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mindspeed_simpo.batch import PairBatch, to_device
from mindspeed_simpo.loss.reference import StepReference
from mindspeed_simpo.loss.scoring import PairScorer, ScoredBatch, TwoPassLoss
from mindspeed_simpo.model.dropout import step_key
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.training.schedule.passes import Engine, Pass
from mindspeed_simpo.training.schedule.rows import Rows

PairScheduleName = Literal["concat", "split", "two_pass"]


@dataclass(frozen=True)
class PairSchedule:
    """Runs micro-batches through the model, forward only or with gradients.

    The loss is ``sum over pairs / num_pairs`` of the global batch. Its gradient does not depend on the micro-batch
    size, the data-parallel degree or the pair schedule:

    - ``concat``: one forward of all rows, one backward.
    - ``split``: one forward of the chosen rows, one forward of the rejected rows, one backward of both. Both graphs
      exist until the backward, so ``split`` stores as many activations as ``concat``.
    - ``two_pass``: each micro-batch is divided into two halves with one sequence of each pair. A forward of the second
      half without a graph gives its sums; then follow forward, loss and backward of the first half, and forward and
      backward of the second half. ``two_pass`` stores half the activations and computes one more forward of half the
      rows. To megatron-core each half is a micro-batch, so gradient accumulation, pipelining and gradient
      synchronisation need no change. Both forwards of the second half are equal, also with dropout.
    """

    engine: Engine
    scorer: PairScorer
    groups: Groups
    device: torch.device
    pair_schedule: PairScheduleName
    sequence_multiple: int
    """Every row's length is a multiple of it, see :attr:`~mindspeed_simpo.config.layout.Layout.sequence_multiple`."""
    step_reference: StepReference | None = None
    """Takes the sums under the models without their adapters, which the schedule then computes before each step; None
    where the reference is another one, or there is none."""
    aux_loss_coeff: float = 0.0
    """Factor of the auxiliary loss of the routers, see :mod:`mindspeed_simpo.model.balance`."""
    dropout_seed: int | None = None
    """Seed of the masks of the adapters' inputs; None without dropout."""

    def forward_backward(self, micro_batches: Sequence[PairBatch], num_pairs: int, step: int = 0) -> list[ScoredBatch]:
        """Accumulate the gradient of the global batch's mean loss in ``main_grad``, reduced over all ranks.

        Args:
            micro_batches: This rank's micro-batches of the global batch, in host memory.
            num_pairs: Pairs of the global batch, over all ranks.
            step: Number of the optimizer step, from 0, on which the masks of dropout depend.

        Returns:
            The detached records of the micro-batches; empty except on the last pipeline rank.

        Raises:
            ConfigError: see :meth:`PairScorer.gradients`; ``two_pass`` only.
        """
        self._score_reference(micro_batches)
        # DDP divides the gradient by the data-parallel size
        weight = self.groups.data.size() / num_pairs
        key = None if self.dropout_seed is None else step_key(self.dropout_seed, step)
        if self.pair_schedule == "two_pass":
            return self._two_pass(micro_batches, weight, key)
        passes = self._joint_passes(micro_batches, weight)
        return self._run([self._with_balance(each, weight) for each in passes], forward_only=False, dropout_key=key)

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[PairBatch]) -> list[ScoredBatch]:
        """Evaluate micro-batches without gradients; returns as :meth:`forward_backward`."""
        self._score_reference(micro_batches)
        return self._run(self._joint_passes(micro_batches, 1.0), forward_only=True)

    @torch.no_grad()
    def token_logprobs(self, micro_batches: Sequence[PairBatch]) -> list[list[Float[Tensor, " token"]]]:
        """Log-probability of each response token, nats.

        Returns:
            For each micro-batch its sequences (chosen 0..P-1, then rejected P..2P-1), for each the scored tokens in
            order, in host memory; empty except on the last pipeline rank.
        """
        rows = [dataclasses.replace(Rows.of(batch), each_alone=True) for batch in micro_batches]
        found = self._run([Pass(each, _record) for each in rows], forward_only=True)
        tokens = []
        for batch, logprobs in zip(micro_batches if found else [], found, strict=True):
            places = batch.scored_places
            # the interleaved schedule has made all rows as long as the longest
            by_place = logprobs.cpu().view(len(places), -1)[:, : places.shape[1]]
            tokens.append([of_sequence[mask] for of_sequence, mask in zip(by_place, places, strict=True)])
        return tokens

    @torch.no_grad()
    def _score_reference(self, micro_batches: Sequence[PairBatch]) -> None:
        if self.step_reference is None:
            return
        with self.engine.without_adapters():
            found = self._run([Pass(Rows.of(batch), _record) for batch in micro_batches], forward_only=True)
        if found:  # the schedule returns an empty list except on the last pipeline rank
            ids = torch.cat([to_device(batch.pair_ids, self.device) for batch in micro_batches])
            self.step_reference.set(ids, torch.cat([sums.view(2, -1).t() for sums in found]))

    def _joint_passes(self, micro_batches: Sequence[PairBatch], weight: float) -> list[Pass]:
        return [Pass(Rows.of(batch), partial(self._joint_loss, batch, weight)) for batch in micro_batches]

    def _joint_loss(
        self, batch: PairBatch, weight: float, logprobs: Float[Tensor, " sequence"]
    ) -> tuple[Tensor, ScoredBatch]:
        loss, scored = self.scorer(batch.to(self.device), *logprobs.chunk(2))
        return loss * weight, scored

    def _two_pass(
        self, micro_batches: Sequence[PairBatch], weight: float, dropout_key: int | None
    ) -> list[ScoredBatch]:
        halves = [Rows.of(batch).two_pass_halves(batch.lengths, self.sequence_multiple) for batch in micro_batches]
        with torch.no_grad():
            # the schedule returns an empty list except on the last pipeline rank
            seconds = [Pass(second.rows, _record) for _, second in halves]
            second_sums = self._run(seconds, forward_only=True, dropout_key=dropout_key)
        passes = []
        for index, (batch, (first, second)) in enumerate(zip(micro_batches, halves, strict=True)):
            order = to_device(torch.cat([first.sequences, second.sequences]), self.device)
            sums = second_sums[index] if second_sums else None
            loss = TwoPassLoss(partial(self._gradients, batch), weight, order, sums)
            halves_of_batch = Pass(first.rows, loss.first_half), Pass(second.rows, loss.second_half)
            passes += [self._with_balance(each, weight) for each in halves_of_batch]
        return self._run(passes, forward_only=False, dropout_key=dropout_key)[::2]

    def _with_balance(self, each: Pass, weight: float) -> Pass:
        """The pass with the auxiliary loss, a mean over the two sequences of all pairs."""
        # as megatron-core's schedule multiplies the loss: DDP takes the mean over context-parallel ranks too
        share = self.aux_loss_coeff * weight / 2 * self.groups.context.size()
        return dataclasses.replace(each, sequence_weight=share)

    def _gradients(
        self, batch: PairBatch, chosen: Float[Tensor, " pair"], rejected: Float[Tensor, " pair"]
    ) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"], ScoredBatch]:
        return self.scorer.gradients(batch.to(self.device), chosen, rejected)

    def _run(self, passes: Sequence[Pass], *, forward_only: bool, dropout_key: int | None = None) -> list[Any]:
        split = self.pair_schedule == "split" and not forward_only
        return self.engine.run(passes, split=split, forward_only=forward_only, dropout_key=dropout_key)


def _record(logprobs: Float[Tensor, " sequence"]) -> tuple[Tensor, Float[Tensor, " sequence"]]:
    return logprobs.sum(), logprobs
