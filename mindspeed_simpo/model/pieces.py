"""Pieces of parameters for checkpoints: rectangles of Hugging Face tensors, whatever layout wrote them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from mindspeed_simpo.model.slots import HFTensor, Slot, Span


@dataclass(frozen=True)
class Piece:
    """A rectangle of a Hugging Face tensor, and its elements among those of a rank's parameter."""

    tensor: HFTensor
    offsets: tuple[int, ...]
    """First index of the rectangle along each axis of ``tensor``."""
    shape: tuple[int, ...]
    block_start: int
    """First element, in the flat parameter, of the block of the parameter that contains the rectangle."""
    block_shape: tuple[int, ...]
    block_axis: int
    """The axis along which the rectangle is a part of the block."""
    first: int
    """First index of the rectangle along ``block_axis`` of the block."""

    def view(self, flat: Tensor, start: int) -> Tensor:
        """The rectangle as a view of ``flat``, which holds the elements of the flat parameter from ``start`` on."""
        begin = self.block_start - start
        block = flat[begin : begin + math.prod(self.block_shape)].view(self.block_shape)
        return block.narrow(self.block_axis, self.first, self.shape[self.block_axis])


def pieces_of(slot: Slot, rank: int, size: int, start: int, stop: int) -> list[Piece]:
    """The pieces that cover elements ``start`` to ``stop - 1`` of a flat parameter, without its padding.

    Args:
        slot: Description of the parameter.
        rank: Rank among those that hold the parts of the parameter, see :class:`Slot`.
        size: Number of these ranks.
        start: First element.
        stop: Element after the last.
    """
    shape = slot.block_shape(rank, size)
    length = math.prod(shape)
    found: list[Piece] = []
    for index, spans in enumerate(slot.blocks(rank, size)):
        begin = index * length
        first, last = max(start - begin, 0), min(stop - begin, length)
        found += _pieces_of_block(spans, slot.axis or 0, shape, begin, first, last)
    return found


def _pieces_of_block(
    spans: Sequence[Span], axis: int, shape: Sequence[int], begin: int, start: int, stop: int
) -> Iterator[Piece]:
    """The pieces of elements ``start`` to ``stop - 1`` of the block whose first element is ``begin``."""
    for block_start, bounds in blocks(start, stop, shape):
        position = 0
        for span in spans:
            low, high = max(bounds[axis][0], position), min(bounds[axis][1], position + span.length)
            if span.tensor is not None and low < high:
                offsets, sizes = [first for first, _ in bounds], [last - first for first, last in bounds]
                block_shape = tuple(sizes)
                offsets[axis], sizes[axis] = low - position + span.start, high - low
                first = low - bounds[axis][0]
                yield Piece(span.tensor, tuple(offsets), tuple(sizes), begin + block_start, block_shape, axis, first)
            position += span.length


def blocks(start: int, stop: int, shape: Sequence[int]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """The rectangles, in order, that partition elements ``start`` to ``stop - 1`` of an array in row-major order.

    At most two rectangles for each axis but the last, and one more.

    Args:
        start: First element.
        stop: Element after the last.
        shape: Shape of the array.

    Yields:
        The first element, and ``(first, stop)`` along each axis. The elements of a rectangle are consecutive.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield start, [(start, stop)]
        return
    size = math.prod(shape[1:])
    whole = [(0, length) for length in shape[1:]]
    row, end = start // size, stop // size
    if start % size:
        last = min(stop, (row + 1) * size)
        yield from _inside_row(row, start, last, size, shape)
        row += 1
    if row < end:
        yield row * size, [(row, end), *whole]
    if row <= end and stop % size:
        yield from _inside_row(end, end * size, stop, size, shape)


def _inside_row(
    row: int, start: int, stop: int, size: int, shape: Sequence[int]
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    for inner, bounds in blocks(start - row * size, stop - row * size, shape[1:]):
        yield row * size + inner, [(row, row + 1), *bounds]
