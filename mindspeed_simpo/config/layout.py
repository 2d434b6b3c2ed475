"""How ranks are divided: the one type of degrees and of the switches that change what is exchanged along them."""

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
}
"""The configuration key that turns each axis on."""


@dataclass(frozen=True)
class Layout:
    """Degrees of the parallel axes, whose product is the number of ranks, and their switches."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    virtual_pipeline: bool = False
    distributed_optimizer: bool = False

    @property
    def ranks(self) -> int:
        """Processes that it takes."""
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def axes(self) -> frozenset[str]:
        """The axes in use, of ``AXES``; sequence parallelism does nothing on one tensor-parallel rank."""
        used = {
            "TP": self.tensor > 1,
            "SP": self.sequence_parallel and self.tensor > 1,
            "CP": self.context > 1,
            "PP": self.pipeline > 1,
            "VPP": self.virtual_pipeline,
            "DP": self.data > 1,
            "DO": self.distributed_optimizer,
        }
        return frozenset(axis for axis, on in used.items() if on)

    @property
    def sequence_multiple(self) -> int:
        """What the length of a row must be a multiple of, so that every rank gets equal parts."""
        return (self.tensor if self.sequence_parallel else 1) * (2 * self.context if self.context > 1 else 1)

    def __str__(self) -> str:
        sizes = {"TP": self.tensor, "CP": self.context, "PP": self.pipeline, "DP": self.data}
        parts = [f"{axis}{sizes.get(axis, '')}" for axis in AXES if axis in self.axes]
        return " ".join(parts) or "one rank"


def names_of(axes: frozenset[str]) -> str:
    """The keys that turn the axes on, for a message."""
    return " and ".join(AXES[axis] for axis in AXES if axis in axes)
