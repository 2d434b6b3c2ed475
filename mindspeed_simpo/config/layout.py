"""The parallel layout: the degree of each parallel axis and the switches that change its communication."""

from __future__ import annotations

from dataclasses import dataclass

AXES = {
    "TP": "tensor_model_parallel_size",
    "SP": "sequence_parallel",
    "CP": "context_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "num_layers_per_virtual_pipeline_stage",
    "DP": "data parallelism (more ranks than TP x CP x PP)",
    "DO": "use_distributed_optimizer",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
}
"""Abbreviation of each axis -> the configuration key that turns the axis on."""


@dataclass(frozen=True)
class Layout:
    """Degrees of tensor, context, pipeline and data parallelism, whose product is the number of ranks, and switches."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    virtual_pipeline: bool = False
    distributed_optimizer: bool = False
    expert: int = 1
    """Ranks, among the tensor-, context- and data-parallel ones, over which the experts of a layer are divided."""
    expert_tensor: int | None = None
    """Ranks over which each expert is divided; None for as many as ``tensor``."""

    @property
    def expert_tensor_ranks(self) -> int:
        """``expert_tensor`` with its default."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def experts_span_data_ranks(self) -> bool:
        """Whether ranks with other pairs compute this rank's tokens, and so must do equally many passes."""
        return self.expert * self.expert_tensor_ranks > self.tensor * self.context

    @property
    def ranks(self) -> int:
        """Number of processes: the product of the degrees."""
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def axes(self) -> frozenset[str]:
        """The axes in use, of ``AXES``; sequence parallelism counts only with several tensor-parallel ranks."""
        used = {
            "TP": self.tensor > 1,
            "SP": self.sequence_parallel and self.tensor > 1,
            "CP": self.context > 1,
            "PP": self.pipeline > 1,
            "VPP": self.virtual_pipeline,
            "DP": self.data > 1,
            "DO": self.distributed_optimizer,
            "EP": self.expert > 1,
            "ETP": self.expert_tensor_ranks != self.tensor,
        }
        return frozenset(axis for axis, on in used.items() if on)

    @property
    def sequence_multiple(self) -> int:
        """The length of a row, in tokens, must be a multiple of this number, so that all ranks hold equal parts."""
        return (self.tensor if self.sequence_parallel else 1) * (2 * self.context if self.context > 1 else 1)

    def __str__(self) -> str:
        sizes = {"TP": self.tensor, "CP": self.context, "PP": self.pipeline, "DP": self.data}
        sizes |= {"EP": self.expert, "ETP": self.expert_tensor_ranks}
        parts = [f"{axis}{sizes.get(axis, '')}" for axis in AXES if axis in self.axes]
        return " ".join(parts) or "one rank"


def names_of(axes: frozenset[str]) -> str:
    """The configuration keys that turn the axes on, for error messages."""
    return " and ".join(AXES[axis] for axis in AXES if axis in axes)
