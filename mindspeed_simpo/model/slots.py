"""Records of the mapping between parameters and Hugging Face tensors; ``model/naming.py`` makes them.

The parameter of one rank is a concatenation of spans: slices of Hugging Face tensors along one axis, and padding. The
parameter of a layer's experts is a stack of such parameters, one of each expert that the rank holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

SlotKind = Literal["base", "adapter"]


@dataclass(frozen=True)
class Place:
    """Where the tensor of one expert lies in the stored tensor of all experts of a layer.

    The stored tensor is ``[expert, inputs, outputs]``, or of biases ``[expert, outputs]``. The tensor of expert
    ``index`` has the outputs ``first``, ``first + step``, ``first + 2 step`` and so on.
    """

    name: str
    shape: tuple[int, ...]
    """Of the stored tensor."""
    index: int
    first: int = 0
    step: int = 1

    def view(self, stored: Tensor) -> Tensor:
        """The tensor ``[outputs, inputs]``, or of biases ``[outputs]``, as a view of the stored tensor."""
        return stored[self.index].t()[self.first :: self.step]


@dataclass(frozen=True)
class HFTensor:
    """A tensor of the Hugging Face checkpoint, or the part of one expert in a tensor of several experts."""

    name: str
    """For a part of a tensor, its name in checkpoints of training alone."""
    shape: tuple[int, ...]
    axis: int | None = None
    """Axis that the tensor-parallel ranks shard; None where every rank has a copy."""
    is_fp32: bool = False
    """Whether the parameter is fp32 whatever the dtype of the model."""
    initial: float | None = None
    """Initial value of all elements under ``init_from: config``; None for values from a normal distribution."""
    place: Place | None = None
    """Where the part of an expert is stored; None for a tensor that is stored by itself."""


@dataclass(frozen=True)
class Span:
    """Elements ``start`` to ``stop - 1`` of ``tensor`` along its axis; zeros (padding) where ``tensor`` is None."""

    tensor: HFTensor | None
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Elements along the axis."""
        return self.stop - self.start

    def part(self, start: int, length: int) -> Span:
        """The span of ``length`` elements that begins ``start`` elements after the start of this span."""
        return Span(self.tensor, self.start + start, self.start + start + length)

    def contains(self, other: Span) -> bool:
        """Whether this span contains all elements of ``other``; False where either is padding."""
        return (
            self.tensor is not None
            and self.tensor == other.tensor
            and (self.start <= other.start and other.stop <= self.stop)
        )


@dataclass(frozen=True)
class Slot:
    """One parameter of a ``PolicyModel`` and the Hugging Face tensors whose elements the parameter holds.

    ``rank`` and ``size`` of the methods are those of the ranks that hold the parts of the parameter: the
    tensor-parallel ranks, or for experts (``of_experts``) the expert-tensor- and expert-parallel ranks together, of
    which the former vary fastest (:meth:`mindspeed_simpo.parallel.Groups.shards`).
    """

    parameter: str
    tensors: tuple[HFTensor, ...]
    divide: Callable[[int, int], Sequence[Span]] | None = field(default=None, compare=False)
    """``(rank, size)`` -> spans of that rank's parameter; None where every rank has a full copy."""
    kind: SlotKind = "base"
    replica: bool = False
    """Whether another pipeline rank holds the same tensor: true for a tied output layer apart from the embedding."""
    scores_experts: bool = False
    """Whether the parameter is the weight of a router."""
    pads_vocabulary: bool = False
    """Whether padding extends the parameter where the tensor-parallel size does not divide the vocabulary."""
    stacked: tuple[Slot, ...] = ()
    """The slots of a layer's experts, of one shape; the parameter stacks those that a rank holds on a new first axis.
    Empty where the parameter is not one of experts."""
    tensor_ranks: int = 1
    """Number of ranks that divide each expert of ``stacked``."""

    @property
    def of_experts(self) -> bool:
        """Whether expert parallelism divides the parameter."""
        return bool(self.stacked)

    @property
    def axis(self) -> int | None:
        """Axis of a Hugging Face tensor that the ranks shard; None where every rank has a copy."""
        return self.tensors[0].axis

    def is_copy(self, rank: int) -> bool:
        """Whether the part of rank ``rank`` is also that of a rank before it, because the ranks do not shard it."""
        return self.axis is None and (rank % self.tensor_ranks if self.of_experts else rank) > 0

    def blocks(self, rank: int, size: int) -> list[tuple[Span, ...]]:
        """The spans, in order and without empty ones, of each block of the parameter of rank ``rank`` of ``size``.

        A block is the whole parameter, or one expert of a stack. Its spans are concatenated along ``axis``.
        """
        if not self.of_experts:
            return [self._spans_of_one(rank, size)]
        number = len(self.stacked) * self.tensor_ranks // size
        expert_rank, tensor_rank = divmod(rank, self.tensor_ranks)
        held = self.stacked[expert_rank * number : (expert_rank + 1) * number]
        return [expert._spans_of_one(tensor_rank, self.tensor_ranks) for expert in held]

    def spans(self, rank: int, size: int) -> tuple[Span, ...]:
        """The spans of all blocks of the parameter of rank ``rank`` of ``size``, in order."""
        return tuple(span for spans in self.blocks(rank, size) for span in spans)

    def block_shape(self, rank: int, size: int) -> tuple[int, ...]:
        """Shape of each block of the parameter of rank ``rank`` of ``size``."""
        shape = list(self.tensors[0].shape)
        shape[self.axis or 0] = sum(span.length for span in self.blocks(rank, size)[0])
        return tuple(shape)

    def shape(self, rank: int, size: int) -> tuple[int, ...]:
        """Shape of the parameter of rank ``rank`` of ``size``."""
        block = self.block_shape(rank, size)
        return (len(self.blocks(rank, size)), *block) if self.of_experts else block

    def split(self, values: Tensor, rank: int, size: int) -> list[list[tuple[Span, Tensor]]]:
        """By block, each span of the parameter of rank ``rank`` of ``size`` and its elements, a view of ``values``.

        Args:
            values: The parameter, or another tensor of its shape.
            rank: Rank among those that hold the parts.
            size: Number of these ranks.
        """
        blocks = values.unbind() if self.of_experts else (values,)
        parts = []
        for spans, block in zip(self.blocks(rank, size), blocks, strict=True):
            views = torch.split(block, [span.length for span in spans], self.axis or 0)
            parts.append(list(zip(spans, views, strict=True)))
        return parts

    def _spans_of_one(self, rank: int, size: int) -> tuple[Span, ...]:
        if self.divide is None:
            return (Span(self.tensors[0], 0, self.tensors[0].shape[0]),)
        return tuple(span for span in self.divide(rank, size) if span.length)


def stack(parameter: str, experts: Sequence[Slot], tensor_ranks: int) -> Slot:
    """The slot of a parameter that stacks the same parameter of several experts.

    Args:
        parameter: Name of the parameter.
        experts: The parameter's slot of each expert of a layer, in order.
        tensor_ranks: Number of ranks that divide each expert.
    """
    tensors = tuple(tensor for expert in experts for tensor in expert.tensors)
    return Slot(parameter, tensors, kind=experts[0].kind, stacked=tuple(experts), tensor_ranks=tensor_ranks)


def evenly(whole: Sequence[Span], rank: int, size: int) -> Sequence[Span]:
    """The concatenation of an equal share of each span, that of rank ``rank`` of ``size``."""
    return [span.part(rank * (span.length // size), span.length // size) for span in whole]


def joined(spans: Sequence[Span]) -> list[Span]:
    """The same elements in as few spans as possible, sorted by tensor and position, without padding.

    Each span of the result is read, or stored in a checkpoint, in one piece.
    """
    stored = [(span.tensor.name, span) for span in spans if span.tensor is not None]
    found: list[Span] = []
    for _, span in sorted(stored, key=lambda each: (each[0], each[1].start)):
        if found and found[-1].tensor == span.tensor and found[-1].stop == span.start:
            found[-1] = Span(span.tensor, found[-1].start, span.stop)
        else:
            found.append(span)
    return found
