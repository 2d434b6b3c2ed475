"""What the configuration reads of a model: the sizes and variants that a layout must respect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class AttentionSizes(Protocol):
    """Sizes and variants of a layer's attention that a layout must respect."""

    @property
    def heads(self) -> int:
        """Number of query heads."""

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""

    @property
    def head_dim(self) -> int:
        """Elements of one head."""

    @property
    def window(self) -> int | None:
        """Sliding window: keys that a query attends to, its own included; None for all earlier ones."""

    @property
    def softcap(self) -> float | None:
        """Soft cap of the attention scores; None for none."""

    @property
    def sinks(self) -> bool:
        """Whether the softmax has a learned sink of each query head."""


class MLPSizes(Protocol):
    """Sizes of a layer's MLP that tensor parallelism divides."""

    @property
    def width(self) -> int:
        """Elements of the inner activation, ``intermediate_size``."""


class ExpertSizes(Protocol):
    """Sizes of a layer's experts that expert parallelism divides."""

    @property
    def number(self) -> int:
        """Number of experts."""

    @property
    def width(self) -> int:
        """Elements of the inner activation of one expert."""


class LayerSizes(Protocol):
    """Sizes of one decoder layer."""

    @property
    def attention(self) -> AttentionSizes:
        """Sizes of the attention."""

    @property
    def mlp(self) -> MLPSizes | None:
        """Sizes of the MLP; None for none."""

    @property
    def experts(self) -> ExpertSizes | None:
        """Sizes of the experts; None for none."""


class Model(Protocol):
    """The part of a model description that validation reads."""

    @property
    def vocab_size(self) -> int:
        """Rows of the output weight."""

    @property
    def layers(self) -> Sequence[LayerSizes]:
        """The decoder layers, from first to last."""

    def shares_prefixes(self, seq_length: int) -> bool:
        """Whether chosen and rejected may share one copy of their prompt, in sequences of ``seq_length`` tokens."""


class DividedModel(Model, Protocol):
    """A model that tensor parallelism divides."""

    def sharded_axes(self, tensor_ranks: int) -> Iterable[tuple[str, int]]:
        """Name and elements of each axis of the sharded projections, but experts, on one of ``tensor_ranks`` ranks."""
