"""Parameters as shards of Hugging Face tensors for ``dist_checkpointing``, independent of the layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from mindspeed_simpo.model.naming import HFTensor, Slot, Span, joined
from mindspeed_simpo.parallel import Groups

_KEY = "parameters"


def sharded_parameter(slot: Slot, parameter: Tensor, groups: Groups) -> ShardedTensor | ShardedTensorFactory:
    """The ``dist_checkpointing`` shards of one parameter, or of its optimizer state, which has the same shape.

    Args:
        slot: Description of the parameter.
        parameter: Values on this rank.
        groups: Process groups of the layout.
    """
    rank, size = groups.tensor.rank(), groups.tensor.size()
    # dist_checkpointing saves replica (0, 0, 0) alone: copies of a tied head, of tensor-parallel, data and context
    # ranks
    copies = groups.data.rank() * groups.context.size() + groups.context.rank()
    replica = (int(slot.replica), rank if slot.axis is None else 0, copies)
    if slot.pads_vocabulary:
        (tensor,) = slot.tensors
        place, key = (0, rank, size), f"{_KEY}/{tensor.name}"
        # padding of the vocabulary depends on the layout
        return ShardedTensor.from_rank_offsets(key, parameter, place, replica_id=replica, allow_shape_mismatch=True)
    spans, units = slot.spans(rank, size), _units(slot, size)
    axis = slot.axis or 0
    wholes = joined(spans)

    def build(key: str, data: Tensor, replica_id: Any, _: Any) -> list[ShardedTensor]:
        found = []
        for whole in wholes:
            tensor = _tensor(whole)
            unit = units[tensor]
            values = _values_of(data, spans, whole, axis)
            for index, part in enumerate(torch.split(values, unit, axis)):
                place = (axis, whole.start // unit + index, tensor.shape[axis] // unit)
                found.append(
                    ShardedTensor.from_rank_offsets(f"{key}/{tensor.name}", part, place, replica_id=replica_id)
                )
        return found

    def merge(loaded: Sequence[Tensor]) -> Tensor:
        merged = loaded[0].new_zeros(slot.shape(rank, size))
        rest = list(loaded)
        for whole in wholes:
            number = whole.length // units[_tensor(whole)]
            values, rest = torch.cat(rest[:number], axis), rest[number:]
            for span, part in _parts(merged, spans, axis):
                if whole.contains(span):
                    part.copy_(values.narrow(axis, span.start - whole.start, span.length))
        return merged

    return ShardedTensorFactory(_KEY, parameter, build, merge, replica)


def _units(slot: Slot, size: int) -> Mapping[HFTensor, int]:
    """Shard length per tensor: the greatest common divisor of the offsets and lengths of all ranks.

    ``dist_checkpointing`` needs shards on a regular grid.
    """
    units = dict.fromkeys(slot.tensors, 0)
    for rank in range(size):
        for whole in joined(slot.spans(rank, size)):
            units[_tensor(whole)] = math.gcd(units[_tensor(whole)], whole.start, whole.length)
    return units


def _tensor(span: Span) -> HFTensor:
    assert span.tensor is not None, "padding is not stored"
    return span.tensor


def _parts(values: Tensor, spans: Sequence[Span], axis: int) -> list[tuple[Span, Tensor]]:
    return list(zip(spans, torch.split(values, [span.length for span in spans], axis), strict=True))


def _values_of(values: Tensor, spans: Sequence[Span], whole: Span, axis: int) -> Tensor:
    held = [(span.start, part) for span, part in _parts(values, spans, axis) if whole.contains(span)]
    parts = [part for _, part in sorted(held, key=lambda each: each[0])]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, axis)).detach()
