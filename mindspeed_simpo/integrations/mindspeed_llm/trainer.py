"""SimPO on MindSpeed-LLM's SFT trainer: its model, data, loop and checkpoints, this package's loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from megatron.training import get_args, get_timers
from mindspeed_llm.tasks.posttrain.sft import SFTTrainer
from torch import Tensor

from mindspeed_simpo.device import reduction_dtype
from mindspeed_simpo.integrations.mindspeed_llm import adapters, two_pass
from mindspeed_simpo.integrations.mindspeed_llm.head import OutputLayerHead
from mindspeed_simpo.integrations.mindspeed_llm.pairs import (
    NextTokenLabels,
    mean_loss,
    pair_inputs,
    row_logprobs,
    row_tokens,
    upstream_groups,
)
from mindspeed_simpo.integrations.mindspeed_llm.refusals import task_options
from mindspeed_simpo.integrations.mindspeed_llm.report import Metrics, pair_metrics
from mindspeed_simpo.integrations.mindspeed_llm.sweeps import Sweeps
from mindspeed_simpo.loss.head import ResponseHead
from mindspeed_simpo.loss.pair_loss import PairLoss

Loss = tuple[Tensor, Metrics]


class SimPOTrainer(SFTTrainer):  # type: ignore[misc]
    """``--stage simpo``."""

    def __init__(self) -> None:
        args = get_args()
        self._objective = PairLoss.of(task_options(args))
        self._groups = upstream_groups()
        self._head: OutputLayerHead | None = None
        if args.fused_logprob:
            # a hook of megatron's DDP waits for the weight's gradient where it overlaps its reduction
            head = ResponseHead(
                self._groups.tensor,
                self._groups.context,
                vocab_size=args.padded_vocab_size,
                sum_dtype=reduction_dtype(torch.device("cpu")),
                chunk_tokens=args.logprob_chunk_tokens,
                sequence_parallel=args.sequence_parallel,
                weight_grad_awaited=args.overlap_grad_reduce,
            )
            self._head = OutputLayerHead(head)
        two_pass, pipelined = args.pair_schedule == "two_pass", args.pipeline_model_parallel_size > 1
        self._two_pass = two_pass and not pipelined
        self.sweeps = (
            Sweeps(self._next, self._logprobs, self._objective, self._groups) if two_pass and pipelined else None
        )
        """What the schedule's wrapper runs in its place, or None."""
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
        return SFTTrainer.get_batch(NextTokenLabels(data_iterator))

    def forward_step(
        self, data_iterator: Iterator[Mapping[str, Any]], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], Loss]]:
        """One micro-batch of pairs: the stage's output and what turns it into the loss and metrics."""
        rows = self._read(data_iterator)
        if self._two_pass and torch.is_grad_enabled():
            return two_pass.forward_step(model, rows, self._score, self._objective, self._groups)
        return self._forward(model, rows), partial(self.loss_func, rows.targets)

    def loss_func(self, input_tensor: Int[Tensor, "row seq"], output_tensor: Tensor) -> Loss:
        """Mean loss of the micro-batch's pairs, and their metrics.

        Args:
            input_tensor: Targets of this rank's positions, rows ``[chosen, rejected]``.
            output_tensor: Logits ``[row, seq, vocabulary shard]``, or ``[row, 1]`` sums from the fused head.
        """
        inputs = pair_inputs(self._logprobs(output_tensor, input_tensor), row_tokens(input_tensor, self._groups))
        output = self._objective(inputs)
        return mean_loss(output), pair_metrics(inputs, output, self._groups.data)

    def _read(self, data_iterator: Iterator[Mapping[str, Any]]) -> two_pass.Rows:
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        tokens, targets, _, attention_mask, position_ids = self.get_batch(data_iterator)
        timers("batch-generator").stop()
        return two_pass.Rows(tokens, targets, attention_mask, position_ids)

    def _next(self, data_iterator: Iterator[Mapping[str, Any]], model: torch.nn.Module) -> tuple[Tensor, Tensor]:
        rows = self._read(data_iterator)
        return self._forward(model, rows), rows.targets

    def _forward(self, model: torch.nn.Module, rows: two_pass.Rows) -> Tensor:
        if self._head is not None:
            self._head.targets = rows.targets
        output: Tensor = model(rows.tokens, rows.position_ids, rows.attention_mask)
        return output

    def _logprobs(self, output: Tensor, targets: Int[Tensor, "row seq"]) -> Float[Tensor, " row"]:
        return output[:, 0] if self._head is not None else row_logprobs(output, targets, self._groups)

    def _score(self, model: torch.nn.Module, rows: two_pass.Rows) -> Float[Tensor, " row"]:
        return self._logprobs(self._forward(model, rows), rows.targets)
