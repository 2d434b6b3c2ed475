"""RMSNorm, and projections whose weights are sharded over the tensor-parallel ranks."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mindspeed_simpo.device import npu_mc2, operators
from mindspeed_simpo.model import description
from mindspeed_simpo.model.megatron.adapters import LinearAdapters
from mindspeed_simpo.parallel import Groups


class RMSNorm(torch.nn.Module):
    """``(weight_offset + weight) * x / sqrt(mean(x^2) + eps)`` over the last axis, rounded as in transformers.

    megatron-core's wrapper of ``torch.nn.RMSNorm`` refuses sequence parallelism and rounds differently in bfloat16.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, norm: description.Norm, **_: Any) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.norm = norm

    def forward(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """``hidden`` normalised over its last axis, in the same dtype."""
        norm = self.norm
        return operators.rms_norm(hidden, self.weight, norm.eps, norm.weight_offset, rounds_last=norm.rounds_last)


class _Adapted(torch.nn.Module):
    """A projection whose output includes the product of its adapters, where it has any."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.adapters: LinearAdapters | None = None

    def forward(self, hidden: Float[Tensor, "held row inputs"]) -> tuple[Tensor, Tensor | None]:
        """The output, and the bias that it does not include."""
        output, bias = super().forward(hidden)
        if self.adapters is not None and self.adapters.active:
            output = output + self.adapters(hidden)
        return output, bias


class _Replicated(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int, config: TransformerConfig, *, bias: bool) -> None:
        super().__init__()
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, **options))
        self.bias = torch.nn.Parameter(torch.empty(outputs, **options)) if bias else None
        for parameter in self.parameters():
            # with sequence parallelism each rank computes the gradient from its own tokens
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Float[Tensor, "held row inputs"]) -> tuple[Float[Tensor, "held row outputs"], None]:
        return torch.nn.functional.linear(hidden, self.weight, self.bias), None


class _AdaptedReplicated(_Adapted, _Replicated):  # type: ignore[misc]
    pass


class _AdaptedColumns(_Adapted, ColumnParallelLinear):  # type: ignore[misc]
    pass


class _AdaptedRows(_Adapted, RowParallelLinear):  # type: ignore[misc]
    pass


class _FusedColumns(ColumnParallelLinear):  # type: ignore[misc]
    """Multiplies while the sequence is gathered."""

    def __init__(self, *arguments: Any, group: dist.ProcessGroup, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.group = group

    def forward(self, hidden: Float[Tensor, "held row inputs"]) -> tuple[Tensor, Tensor | None]:
        output = npu_mc2.gathered_linear(hidden, self.weight, self.group)
        if self.bias is None or self.skip_bias_add:
            return output, self.bias
        return output + self.bias, None


class _FusedRows(RowParallelLinear):  # type: ignore[misc]
    """Multiplies while the sums are scattered."""

    def __init__(self, *arguments: Any, group: dist.ProcessGroup, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.group = group

    def forward(self, hidden: Float[Tensor, "seq row inputs"]) -> tuple[Tensor, Tensor | None]:
        return npu_mc2.scattered_linear(hidden, self.weight, self.group), self.bias


class _AdaptedFusedColumns(_Adapted, _FusedColumns):
    pass


class _AdaptedFusedRows(_Adapted, _FusedRows):
    pass


def column_parallel(
    inputs: int, outputs: int, config: TransformerConfig, groups: Groups, *, bias: bool, adds_bias: bool
) -> torch.nn.Module:
    """A projection with outputs sharded over the tensor-parallel ranks; returns ``(output, bias that is not added)``.

    Args:
        inputs: Input features.
        outputs: Output features over all ranks.
        config: See :func:`~mindspeed_simpo.model.megatron.layers.transformer_config`.
        groups: Process groups of the layout.
        bias: Whether the projection has a bias.
        adds_bias: Whether the output includes the bias; the module returns the bias otherwise.
    """
    fused = partial(_AdaptedFusedColumns, group=groups.tensor)
    kind = fused if config.use_ascend_mc2 else _AdaptedColumns
    linear: torch.nn.Module = kind(
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


def replicated(inputs: int, outputs: int, config: TransformerConfig, *, bias: bool) -> torch.nn.Module:
    """A projection that every tensor-parallel rank has whole; returns ``(output with the bias, None)``.

    The rank's gradient is the whole one where the backward of what follows sums over the ranks, or with sequence
    parallelism, under which megatron-core sums it over the ranks.

    Args:
        inputs: Input features.
        outputs: Output features.
        config: Configuration of megatron-core.
        bias: Whether the projection has a bias.
    """
    return _AdaptedReplicated(inputs, outputs, config, bias=bias)


def row_parallel(
    inputs: int, outputs: int, config: TransformerConfig, groups: Groups, *, bias: bool
) -> torch.nn.Module:
    """A projection with inputs sharded over the tensor-parallel ranks; returns ``(output, bias that is not added)``.

    An all-reduce, or under sequence parallelism a reduce-scatter, sums the output over the ranks.

    Args:
        inputs: Input features over all ranks.
        outputs: Output features.
        config: See :func:`~mindspeed_simpo.model.megatron.layers.transformer_config`.
        groups: Process groups of the layout.
        bias: Whether the projection has a bias.
    """
    fused = partial(_AdaptedFusedRows, group=groups.tensor)
    kind = fused if config.use_ascend_mc2 else _AdaptedRows
    linear: torch.nn.Module = kind(
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
    # megatron-core 0.12 has no such argument and takes the group from parallel_state
    takes_group = "tp_group" in inspect.signature(linear.__init__).parameters  # type: ignore[misc]
    return {"tp_group": groups.tensor} if takes_group else {}
