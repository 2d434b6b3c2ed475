"""The objectives without a reference model, on MindSpeed-LLM's SFT trainer: its model, data, loop and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from megatron.training import get_args, get_timers
from mindspeed_llm.tasks.posttrain.sft import SFTTrainer
from torch import Tensor

from mindspeed_simpo.config.resolution import default_chunk_tokens
from mindspeed_simpo.device import find_device, reduction_dtype
from mindspeed_simpo.integrations.mindspeed_llm import adapters
from mindspeed_simpo.integrations.mindspeed_llm.head import OutputLayerHead
from mindspeed_simpo.integrations.mindspeed_llm.pairs import (
    pair_batch,
    pair_inputs,
    pair_loss,
    row_logprobs,
    row_tokens,
    upstream_groups,
)
from mindspeed_simpo.integrations.mindspeed_llm.report import Metrics, joint_loss
from mindspeed_simpo.integrations.mindspeed_llm.two_pass import TwoPass
from mindspeed_simpo.loss.head import ResponseHead

Loss = tuple[Tensor, Metrics]


class PairTrainer(SFTTrainer):  # type: ignore[misc]
    """``--stage`` of every objective that needs no reference model."""

    def __init__(self) -> None:
        args = get_args()
        self._objective = pair_loss(args)
        self._groups = upstream_groups()
        self._head: OutputLayerHead | None = None
        if args.fused_logprob:
            local_vocabulary = args.padded_vocab_size // self._groups.tensor.size()
            head = ResponseHead(
                self._groups.tensor,
                self._groups.context,
                vocab_size=args.padded_vocab_size,
                sum_dtype=reduction_dtype(torch.device("cpu")),
                chunk_tokens=args.logprob_chunk_tokens or default_chunk_tokens(find_device(), local_vocabulary),
                sequence_parallel=args.sequence_parallel,
                weight_grad_awaited=args.overlap_grad_reduce,
            )
            self._head = OutputLayerHead(head)
        self.two_pass: TwoPass | None = None
        """Runs the iterations with ``--pair-schedule two_pass``; the schedule's wrapper calls it."""
        if args.pair_schedule == "two_pass":
            self.two_pass = TwoPass(self._next, self._logprobs, self._objective, self._groups)
        super().__init__()

    def model_provider(self, pre_process: bool = True, post_process: bool = True) -> Any:
        """Upstream's model; with ``--fused-logprob`` its output layer returns log-probability sums of rows."""
        model: Any = super().model_provider(pre_process, post_process)
        adapters.keep_gradients(model, get_args())
        if self._head is not None and post_process:
            self._head.replace(model.output_layer)
        return model

    @staticmethod
    def get_batch(data_iterator: Iterator[Mapping[str, Any]]) -> Any:
        """Upstream's batch, its labels shifted before they are sliced over context-parallel ranks."""
        return pair_batch(SFTTrainer.get_batch, data_iterator, get_args())

    def forward_step(
        self, data_iterator: Iterator[Mapping[str, Any]], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], Loss]]:
        """One micro-batch of pairs: the pipeline rank's output and what turns it into the loss and metrics."""
        output, targets = self._next(data_iterator, model)
        return output, partial(self.loss_func, targets)

    def loss_func(self, input_tensor: Int[Tensor, "row seq"], output_tensor: Tensor) -> Loss:
        """Mean loss of the micro-batch's pairs, and their metrics.

        Args:
            input_tensor: Targets of this rank's positions, rows ``[chosen, rejected]``.
            output_tensor: Logits ``[row, seq, vocabulary shard]``, or ``[row, 1]`` sums from the fused head.
        """
        inputs = pair_inputs(self._logprobs(output_tensor, input_tensor), row_tokens(input_tensor, self._groups))
        return joint_loss(self._objective, inputs, self._groups.data)

    def _next(
        self, data_iterator: Iterator[Mapping[str, Any]], model: torch.nn.Module
    ) -> tuple[Tensor, Int[Tensor, "row seq"]]:
        """This pipeline rank's output for the next batch, and the targets of its rows."""
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        tokens, targets, _, attention_mask, position_ids = self.get_batch(data_iterator)
        timers("batch-generator").stop()
        if self._head is not None:
            self._head.targets = targets
        output: Tensor = model(tokens, position_ids, attention_mask)
        return output, targets

    def _logprobs(self, output: Tensor, targets: Int[Tensor, "row seq"]) -> Float[Tensor, " row"]:
        return output[:, 0] if self._head is not None else row_logprobs(output, targets, self._groups)
