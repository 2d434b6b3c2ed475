"""Ascend NPUs: torch_npu as device, and its fused operators.

Each operator is called as the Ascend Extension for PyTorch documentation describes. None has been run on an NPU yet.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mindspeed_simpo.device import npu_environment, npu_sinks

# values of sparse_mode of npu_fusion_attention; both take the compressed mask and align it to the last query and key
_RIGHT_DOWN_CAUSAL = 3
_BAND = 4
_COMPRESSED_MASK_SIZE = 2048
_MOST_DOCUMENTS = 2048
"""Documents of one call of npu_fusion_attention."""
_MOST_ROTATED = 999
"""Rows of one call of npu_rotary_mul; in the mode interleave, rows times heads."""


def is_available() -> bool:
    """Whether torch_npu is installed and sees a device."""
    if importlib.util.find_spec("torch_npu") is None:
        return False
    npu_environment.set_defaults()
    importlib.import_module("torch_npu")
    return bool(getattr(torch, "npu").is_available())  # noqa: B009 - torch_npu adds it


def is_on_npu(tensor: Tensor) -> bool:
    """Whether ``tensor`` is on an NPU, so that the operators of torch_npu accept it."""
    return tensor.device.type == "npu"


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * hidden / sqrt(mean(hidden^2) + eps)`` over the last axis, by ``npu_rms_norm``.

    Args:
        hidden: ``[..., dim]``, of the same dtype as ``weight``.
        weight: ``[dim]``.
        eps: Added to the mean square.
    """
    import torch_npu

    normed: Tensor = torch_npu.npu_rms_norm(hidden, weight, epsilon=eps)[0]
    return normed


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` by ``npu_swiglu``.

    Args:
        gate_up: ``[..., 2 x dim]``; the first half is ``gate``, the second half is ``up``.

    Returns:
        ``[..., dim]``.
    """
    import torch_npu

    if not gate_up.numel():  # the experts of a rank may have no token, and the operator refuses empty tensors
        return gate_up[..., : gate_up.shape[-1] // 2]
    activated: Tensor = torch_npu.npu_swiglu(gate_up, dim=-1)
    return activated


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, stops: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, stops)
        return _grouped_matmul(rows, weights.transpose(1, 2), stops, group_type=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights, stops = ctx.saved_tensors
        grad = grads[0].contiguous()
        rows_grad = _grouped_matmul(grad, weights, stops, group_type=0)
        weights_grad = _grouped_matmul(grad.t(), rows, stops, group_type=2)
        return rows_grad, weights_grad, None


def grouped_linear(rows: Tensor, weights: Tensor, stops: Tensor) -> Tensor:
    """``rows_g weights_g^T`` for each group ``g`` of consecutive rows, by ``npu_grouped_matmul``.

    Args:
        rows: ``[rows, in]``.
        weights: ``[groups, out, in]``.
        stops: int64 ``[groups]``, the number of rows up to the end of each group.

    Returns:
        ``[rows, out]``.
    """
    result: Tensor = _GroupedLinear.apply(rows, weights, stops)  # type: ignore[no-untyped-call]
    return result


def _grouped_matmul(left: Tensor, right: Tensor, stops: Tensor, group_type: int) -> Tensor:
    """Groups of the rows of ``left`` (``group_type`` 0), or of the summed axis (2), whose result has a group axis."""
    import torch_npu

    if not left.numel():
        groups = [] if group_type == 0 else [len(stops)]
        return left.new_zeros(*groups, left.shape[0], right.shape[-1])
    [result] = torch_npu.npu_grouped_matmul(
        [left], [right], group_list=stops, split_item=3, group_type=group_type, group_list_type=0
    )
    product: Tensor = result
    return product


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor, *, interleaved: bool = False) -> Tensor:
    """``heads cosines + turned(heads) sines``, ``turned(a, b) = (-b, a)`` of each pair, by ``npu_rotary_mul``.

    Args:
        heads: ``[seq, row, heads, dim]``, fewer than 1000 heads. One call of the operator takes fewer than 1000 rows,
            in the mode ``interleave`` fewer than ``1000 / heads``, of the same angles: more rows take more calls.
        cosines: ``[seq, 1 or row, 1, dim]``, of the dtype of ``heads``.
        sines: As ``cosines``.
        interleaved: Whether the pairs are ``(x[2i], x[2i + 1])``; else they are ``(x[i], x[dim / 2 + i])``.
    """
    import torch_npu

    mode, at_once = "half", _MOST_ROTATED
    if interleaved:
        mode, at_once = "interleave", 1 if cosines.shape[1] > 1 else max(1, _MOST_ROTATED // heads.shape[2])
    parts = torch.split(heads, at_once, dim=1)
    tables = [(cosines, sines)] * len(parts)
    if cosines.shape[1] > 1:
        tables = list(zip(torch.split(cosines, at_once, dim=1), torch.split(sines, at_once, dim=1), strict=True))
    rotated = [
        torch_npu.npu_rotary_mul(part, *table, rotary_mode=mode) for part, table in zip(parts, tables, strict=True)
    ]
    return rotated[0] if len(rotated) == 1 else torch.cat(rotated, dim=1)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``softmax(scale q k^T) v`` by ``npu_fusion_attention``; the queries are the last positions of the keys.

    Args:
        query: ``[queries, row, heads, dim]``.
        key: ``[keys, row, groups, dim]``; ``heads / groups`` consecutive query heads share one key-value head.
        value: As ``key``.
        scale: Factor of the scores ``q k^T``.
        window: Number of last keys that a query attends to, its own position included; None for all up to its own.
        sinks: ``[heads]``, the score of one more key of each query head, whose value is zero; None for none.

    Returns:
        ``[queries, row, heads x dim]``.
    """
    inputs = query.flatten(2), key.flatten(2), value.flatten(2)
    return _attention(inputs, query.shape[2], "SBH", scale, sinks, _visible(window))


def _attention(
    inputs: tuple[Tensor, Tensor, Tensor],
    heads: int,
    layout: str,
    scale: float,
    sinks: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    import torch_npu

    options = {"atten_mask": _compressed_mask(inputs[0].device), **options}
    if sinks is not None:
        return npu_sinks.attention(*inputs, sinks, layout, scale, options)
    context: Tensor = torch_npu.npu_fusion_attention(*inputs, heads, layout, scale=scale, **options)[0]
    return context


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of concatenated documents by ``npu_fusion_attention`` in the layout TND.

    One call of the operator takes 2,048 documents: more take more calls.

    Args:
        query: ``[queries, 1, heads, dim]``, of all documents.
        key: ``[keys, 1, groups, dim]``; ``heads / groups`` consecutive query heads share one key-value head.
        value: As ``key``.
        query_lengths: Queries of each document; they are the last positions of the document's keys.
        key_lengths: Keys of each document.
        scale: Factor of the scores ``q k^T``.
        window: As in :func:`causal_attention`.
        sinks: As in :func:`causal_attention`.

    Returns:
        ``[queries, 1, heads x dim]``.
    """
    if len(query_lengths) > _MOST_DOCUMENTS:
        blocks = _blocks(query, key, value, query_lengths, key_lengths)
        return torch.cat([varlen_attention(*block, scale, window, sinks) for block in blocks])
    ends = {
        "actual_seq_qlen": list(itertools.accumulate(query_lengths)),
        "actual_seq_kvlen": list(itertools.accumulate(key_lengths)),
    }
    inputs = query[:, 0], key[:, 0], value[:, 0]
    context = _attention(inputs, query.shape[2], "TND", scale, sinks, {**ends, **_visible(window)})
    return context.flatten(1)[:, None]


def _blocks(
    query: Tensor, key: Tensor, value: Tensor, query_lengths: Sequence[int], key_lengths: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Sequence[int], Sequence[int]]]:
    """The arguments of :func:`varlen_attention`, in blocks of as many documents as one call of the operator takes."""
    starts = range(0, len(query_lengths), _MOST_DOCUMENTS)
    of_queries, of_keys = (
        [lengths[start : start + _MOST_DOCUMENTS] for start in starts] for lengths in (query_lengths, key_lengths)
    )
    queries = torch.split(query, [sum(lengths) for lengths in of_queries])
    keys, values = (torch.split(tensor, [sum(lengths) for lengths in of_keys]) for tensor in (key, value))
    return zip(queries, keys, values, of_queries, of_keys, strict=True)


def _visible(window: int | None) -> dict[str, Any]:
    """Arguments of ``npu_fusion_attention`` for a causal mask, or for a causal mask with a sliding window."""
    if window is None:
        return {"sparse_mode": _RIGHT_DOWN_CAUSAL}
    return {"sparse_mode": _BAND, "pre_tockens": window - 1, "next_tockens": 0}


@functools.cache
def _compressed_mask(device: torch.device) -> Tensor:
    """The upper triangular mask ``[2048, 2048]`` that the operator takes for any length; True masks a score out."""
    ones = torch.ones(_COMPRESSED_MASK_SIZE, _COMPRESSED_MASK_SIZE, dtype=torch.bool, device=device)
    return ones.triu(1)
