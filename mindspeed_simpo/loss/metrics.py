"""The logged metrics of each pair, by name; ``training`` and the MindSpeed-LLM plug-in both use this list."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mindspeed_simpo.losses import LossInputs, LossOutput
from mindspeed_simpo.objectives import METRICS


def pair_metrics(inputs: LossInputs, output: LossOutput, dtype: torch.dtype) -> dict[str, Float[Tensor, " pair"]]:
    """Every metric of each pair, in the order of ``METRICS``, then the metrics that the objective declares.

    Args:
        inputs: Detached sums and counts.
        output: The result of the objective for ``inputs``.
        dtype: The dtype in which the caller sums the metrics; that of the result.
    """
    chosen_tokens, rejected_tokens = inputs.chosen_tokens.to(dtype), inputs.rejected_tokens.to(dtype)
    chosen_reward, rejected_reward = output.chosen_reward.to(dtype), output.rejected_reward.to(dtype)
    values = (
        output.loss.detach().to(dtype),
        chosen_reward,
        rejected_reward,
        (chosen_reward > rejected_reward).to(dtype),
        chosen_reward - rejected_reward,
        inputs.chosen_logprob.to(dtype) / chosen_tokens.clamp(min=1),
        inputs.rejected_logprob.to(dtype) / rejected_tokens.clamp(min=1),
        output.sft_loss.to(dtype),
        chosen_tokens,
        rejected_tokens,
    )
    own = {name: metric.to(dtype) for name, metric in output.metrics.items()}
    return dict(zip(METRICS, values, strict=True)) | own
