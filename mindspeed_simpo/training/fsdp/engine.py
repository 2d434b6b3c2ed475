"""The engine of the fsdp backend: passes one after the other, with one reduction of the gradients at the end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mindspeed_simpo.loss.head import ResponseHead
from mindspeed_simpo.model.fsdp.policy import ImageTokens, Policy
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.training.schedule.passes import Pass
from mindspeed_simpo.training.schedule.rows import RowShard


@dataclass(frozen=True)
class FsdpEngine:
    """Runs a sharded model on the rows of passes.

    FSDP2 takes the mean of the gradients over all ranks. Context-parallel ranks, which have parts of one sequence, must
    add up theirs, so that each loss is multiplied by their number.
    """

    policy: Policy
    head: ResponseHead
    groups: Groups
    device: torch.device

    def without_adapters(self) -> AbstractContextManager[None]:
        """See :class:`~mindspeed_simpo.training.schedule.passes.Engine`."""
        return self.policy.without_adapters()

    def run(self, passes: Sequence[Pass], *, split: bool, forward_only: bool, dropout_key: int | None) -> list[Any]:
        """See :class:`~mindspeed_simpo.training.schedule.passes.Engine`."""
        causal = self.policy.causal
        assert isinstance(causal, FSDPModule)
        # response tokens are searched on the host: nonzero() on the device forces a host synchronisation
        steps = [(each.shards(self.groups, split=split, dropout_key=dropout_key), each.loss) for each in passes]
        records = []
        for number, (parts, loss_of_pass) in enumerate(steps):
            last = number == len(steps) - 1
            if not forward_only:
                causal.set_requires_gradient_sync(last)
                causal.set_is_last_backward(last)
            outputs = [self._forward(part.to(self.device)) for part in parts]
            loss, record = loss_of_pass(torch.cat(outputs))
            if not forward_only:
                torch.autograd.backward(loss * self.groups.context.size())
            records.append(record)
        if forward_only:
            self.policy.reshard()
        else:
            self._average_adapters()
        return records

    def _forward(self, rows: RowShard) -> Tensor:
        head = partial(self.head, scored=rows.scored)
        tokens = None
        if rows.images is not None:
            assert rows.image_index is not None
            tokens = ImageTokens(rows.images, rows.image_index)
        sums: Tensor = self.policy(
            rows.tokens,
            position_ids=rows.position_ids,
            documents=rows.documents,
            head=head,
            token_keys=rows.token_keys,
            image_tokens=tokens,
        )
        return sums

    @torch.no_grad()
    def _average_adapters(self) -> None:
        """Average the gradients of the adapters, which every rank has whole, over all ranks."""
        trained = (parameter for parameter in self.policy.parameters() if parameter.requires_grad)
        grads = [parameter.grad for parameter in trained if not isinstance(parameter, DTensor)]
        found = [grad for grad in grads if grad is not None]
        if not found or self.groups.world.size() == 1:
            return
        flat = torch.cat([grad.flatten() for grad in found])
        dist.all_reduce(flat, group=self.groups.world)
        flat /= self.groups.world.size()
        for grad, reduced in zip(found, torch.split(flat, [grad.numel() for grad in found]), strict=True):
            grad.copy_(reduced.view_as(grad))
