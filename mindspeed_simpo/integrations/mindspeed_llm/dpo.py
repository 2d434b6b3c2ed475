"""DPO on MindSpeed-LLM's DPO trainer, with this package's log-probabilities and objective: ``--dpo-exact``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from megatron.training import get_args
from mindspeed_llm.tasks.posttrain.dpo import DPOTrainer
from torch import Tensor

from mindspeed_simpo.integrations.mindspeed_llm import adapters
from mindspeed_simpo.integrations.mindspeed_llm.pairs import (
    pair_batch,
    pair_inputs,
    pair_loss,
    row_logprobs,
    row_tokens,
    upstream_groups,
)
from mindspeed_simpo.integrations.mindspeed_llm.report import Metrics, joint_loss


class ExactDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """``--stage dpo --dpo-exact``: upstream's reference model and batches, exact under tensor and context parallelism.

    ``ipo`` works on sums of log-probabilities, as in its paper; upstream's works on means.
    """

    def __init__(self) -> None:
        self._objective = pair_loss(get_args())
        self._groups = upstream_groups()
        super().__init__()

    def model_provider(self, pre_process: bool = True, post_process: bool = True) -> Any:
        """Upstream's model, the policy's and the reference's."""
        model: Any = super().model_provider(pre_process, post_process)
        adapters.keep_gradients(model, get_args())
        return model

    @staticmethod
    def get_batch(data_iterator: Iterator[Mapping[str, Any]]) -> Any:
        """Upstream's batch, its labels shifted before they are sliced over context-parallel ranks."""
        return pair_batch(DPOTrainer.get_batch, data_iterator, get_args())

    def loss_func(
        self, input_tensor: Int[Tensor, "rows seq"], output_tensor: Float[Tensor, "rows seq shard"]
    ) -> tuple[Tensor, Metrics]:
        """Mean loss of the micro-batch's pairs, and their metrics.

        Args:
            input_tensor: Targets; policy's ``[chosen, rejected]`` rows, then the same rows again.
            output_tensor: Logits of the policy's rows, then of the reference model's.
        """
        targets = input_tensor.chunk(2)[0]
        policy_logits, reference_logits = output_tensor.chunk(2)
        with torch.no_grad():
            reference = row_logprobs(reference_logits, targets, self._groups)
        policy = row_logprobs(policy_logits, targets, self._groups)
        inputs = pair_inputs(policy, row_tokens(targets, self._groups), reference)
        return joint_loss(self._objective, inputs, self._groups.data)
