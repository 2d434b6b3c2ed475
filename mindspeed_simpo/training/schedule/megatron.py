"""The engine of the megatron backend: passes as micro-batches of megatron-core's forward-backward schedules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from mindspeed_simpo.device.receive_shapes import Shape, known_receive_shapes
from mindspeed_simpo.loss.head import ResponseHead
from mindspeed_simpo.model.megatron.adapters import without_adapters
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.training.schedule.passes import LossOfPass, Pass
from mindspeed_simpo.training.schedule.rows import Rows, RowShard


@dataclass(frozen=True)
class MegatronEngine:
    """Runs pipeline chunks on the rows of passes, each of which is a micro-batch to megatron-core."""

    models: Sequence[torch.nn.Module]
    """Pipeline chunks of this rank, wrapped in DDP where gradients are wanted."""
    head: ResponseHead
    groups: Groups
    device: torch.device

    def without_adapters(self) -> AbstractContextManager[None]:
        """See :class:`~mindspeed_simpo.training.schedule.passes.Engine`."""
        return without_adapters(self.models)

    def run(self, passes: Sequence[Pass], *, split: bool, forward_only: bool, dropout_key: int | None) -> list[Any]:
        """See :class:`~mindspeed_simpo.training.schedule.passes.Engine`."""
        if len(self.models) > 1:
            # the interleaved schedule sends tensors of one shape
            longest = max(each.rows.tokens.shape[1] for each in passes)
            passes = [dataclasses.replace(each, rows=each.rows.padded_to(longest)) for each in passes]
        # response tokens are searched on the host: nonzero() on the device forces a host synchronisation
        steps = [(each.shards(self.groups, split=split, dropout_key=dropout_key), each.loss) for each in passes]
        with known_receive_shapes([self._sent_shape(each.rows) for each in passes]):
            return get_forward_backward_func()(  # type: ignore[no-any-return]
                forward_step_func=partial(self._forward_step, len(passes)),
                data_iterator=[iter(steps) for _ in self.models],
                model=list(self.models),
                num_microbatches=len(passes),
                seq_length=passes[0].rows.tokens.shape[1],
                micro_batch_size=passes[0].rows.tokens.shape[0],
                forward_only=forward_only,
            )

    def _sent_shape(self, rows: Rows) -> Shape:
        """Shape of the hidden states that pipeline ranks exchange for one pass."""
        config = get_model_config(self.models[0])
        number, length = rows.tokens.shape
        shards = self.groups.context.size() * (self.groups.tensor.size() if config.sequence_parallel else 1)
        return length // shards, number, config.hidden_size

    def _forward_step(
        self, num_passes: int, steps: Iterator[tuple[list[RowShard], LossOfPass]], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Any]]]:
        parts, loss_of_pass = next(steps)
        parts = [part.to(self.device) for part in parts]
        output = self._forward(model, parts[0]) if len(parts) == 1 else self._split_forward(model, parts)

        def loss(logprobs: Float[Tensor, " sequence"]) -> tuple[Tensor, Any]:
            value, record = loss_of_pass(logprobs)
            # megatron-core's schedule divides each loss by the number of micro-batches
            return value * num_passes, record

        return output, loss

    def _forward(self, model: torch.nn.Module, rows: RowShard) -> Tensor:
        """Log-probability sums on the last pipeline rank, hidden states ``[seq, row, hidden]`` on the others."""
        head = partial(self.head, scored=rows.scored)
        output: Tensor = model(
            rows.tokens,
            position_ids=rows.position_ids,
            documents=rows.documents,
            lengths=rows.lengths,
            head=head,
            members=rows.members,
            token_keys=rows.token_keys,
        )
        return output

    def _split_forward(self, model: torch.nn.Module, parts: Sequence[RowShard]) -> Tensor:
        """:meth:`_forward` of each part; pipeline ranks exchange the concatenation along the row axis."""
        received = get_attr_wrapped_model(model, "decoder").input_tensor
        inputs = [None] * len(parts) if received is None else received.chunk(len(parts), dim=1)
        outputs = []
        for part, hidden in zip(parts, inputs, strict=True):
            if hidden is not None:
                get_attr_wrapped_model(model, "set_input_tensor")(hidden.contiguous())
            outputs.append(self._forward(model, part))
        return torch.cat(outputs, dim=outputs[0].dim() // 2)
