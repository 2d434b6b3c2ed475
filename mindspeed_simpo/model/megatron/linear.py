"""Norms and projections, whose weights tensor parallelism divides."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Float
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mindspeed_simpo.device import operators
from mindspeed_simpo.model import description
from mindspeed_simpo.parallel import Groups


class RMSNorm(torch.nn.Module):
    """``(offset + weight) * x / sqrt(mean(x^2) + eps)`` over the last axis, rounded as transformers rounds it.

    megatron-core's wrapper of ``torch.nn.RMSNorm`` refuses sequence parallelism and rounds otherwise in bfloat16.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, norm: description.Norm, **_: Any) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.norm = norm

    def forward(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Normalise each vector of the last axis."""
        return operators.rms_norm(hidden, self.weight, self.norm.eps, self.norm.weight_offset)


def column_parallel(
    inputs: int, outputs: int, config: TransformerConfig, groups: Groups, *, bias: bool, adds_bias: bool
) -> torch.nn.Module:
    """A projection whose outputs the tensor-parallel ranks divide; returns ``(result, bias that is left to add)``.

    Args:
        inputs: Of the whole projection.
        outputs: Of all ranks together.
        config: Of megatron-core.
        groups: Of the layout.
        bias: Whether there is one.
        adds_bias: Whether it is added at once.
    """
    linear: torch.nn.Module = ColumnParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=config.init_method,
        gather_output=False,
        bias=bias,
        skip_bias_add=not adds_bias,
        **_group(ColumnParallelLinear, groups),
    )
    return linear


def row_parallel(
    inputs: int, outputs: int, config: TransformerConfig, groups: Groups, *, bias: bool
) -> torch.nn.Module:
    """A projection whose inputs the tensor-parallel ranks divide; returns ``(sum over the ranks, bias left to add)``.

    Args:
        inputs: Of all ranks together.
        outputs: Of the whole projection.
        config: Of megatron-core.
        groups: Of the layout.
        bias: Whether there is one.
    """
    linear: torch.nn.Module = RowParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=config.output_layer_init_method,
        bias=bias,
        input_is_parallel=True,
        skip_bias_add=True,
        is_expert=False,
        **_group(RowParallelLinear, groups),
    )
    return linear


def _group(linear: type, groups: Groups) -> dict[str, Any]:
    # older lines of megatron-core take the group from parallel_state
    takes_group = "tp_group" in inspect.signature(linear.__init__).parameters  # type: ignore[misc]
    return {"tp_group": groups.tensor} if takes_group else {}
