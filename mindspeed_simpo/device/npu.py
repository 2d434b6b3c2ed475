"""Ascend: torch_npu brings the device, MindSpeed's adaptor brings megatron-core to it, fused operators bring speed.

Each operator is called as its page in the Ascend Extension for PyTorch documentation says; none has been run on an NPU
yet.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed_simpo.errors import ConfigError

# npu_fusion_attention: the mask is aligned to the last query and the last key, and given compressed
_RIGHT_DOWN_CAUSAL = 3
_BAND = 4
_COMPRESSED_MASK_SIZE = 2048


def is_available() -> bool:
    """Whether torch_npu is installed and sees a device."""
    if importlib.util.find_spec("torch_npu") is None:
        return False
    importlib.import_module("torch_npu")
    return bool(getattr(torch, "npu").is_available())  # noqa: B009 - torch_npu adds it


def install_adaptor() -> None:
    """Import torch_npu and MindSpeed's megatron adaptor, which must precede every import of ``megatron``.

    Raises:
        ConfigError: where either is not installed.
    """
    for module, package in (("torch_npu", "torch_npu"), ("mindspeed.megatron_adaptor", "MindSpeed")):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"device: npu needs {package}, which cannot be imported ({error}); install it for your CANN version, "
                "or set device: cpu"
            ) from None


def holds(tensor: Tensor) -> bool:
    """Whether a tensor lies on an NPU, so that its operators take it."""
    return tensor.device.type == "npu"


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * hidden / sqrt(mean(hidden^2) + eps)`` over the last axis, by ``npu_rms_norm``.

    Args:
        hidden: ``[..., dim]``, of the weight's dtype.
        weight: ``[dim]``.
        eps: Added to the mean square.
    """
    import torch_npu

    normed: Tensor = torch_npu.npu_rms_norm(hidden, weight, epsilon=eps)[0]
    return normed


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` by ``npu_swiglu``.

    Args:
        gate_up: ``[..., 2 x dim]``, the gate in the first half.
    """
    import torch_npu

    activated: Tensor = torch_npu.npu_swiglu(gate_up, dim=-1)
    return activated


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor, *, interleaved: bool = False) -> Tensor:
    """``heads cosines + turned(heads) sines``, ``turned(a, b) = (-b, a)`` of each pair, by ``npu_rotary_mul``.

    Args:
        heads: ``[seq, row, heads, dim]``, fewer than 1000 rows and heads, as the operator wants.
        cosines: ``[seq, 1 or row, 1, dim]``, of the dtype of ``heads``.
        sines: As ``cosines``.
        interleaved: Neighbours are a pair, else the numbers at one place of the two halves.
    """
    import torch_npu

    mode = "interleave" if interleaved else "half"
    rotated: Tensor = torch_npu.npu_rotary_mul(heads, cosines, sines, rotary_mode=mode)
    return rotated


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None) -> Tensor:
    """``softmax(scale q k^T) v`` by ``npu_fusion_attention``; the queries are the last positions of the keys.

    Args:
        query: ``[queries, row, heads, dim]``.
        key: ``[keys, row, groups, dim]``; each serves ``heads / groups`` consecutive heads.
        value: As ``key``.
        scale: Of the scores.
        window: Keys that a query sees, its own included; None for all before it.

    Returns:
        ``[queries, row, heads x dim]``.
    """
    import torch_npu

    context: Tensor = torch_npu.npu_fusion_attention(
        query.flatten(2),
        key.flatten(2),
        value.flatten(2),
        query.shape[2],
        "SBH",
        atten_mask=_compressed_mask(query.device),
        scale=scale,
        **_visible(window),
    )[0]
    return context


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention of many documents, end to end, by ``npu_fusion_attention`` in the layout TND.

    Args:
        query: ``[queries, 1, heads, dim]``, of all documents.
        key: ``[keys, 1, groups, dim]``; each serves ``heads / groups`` consecutive heads.
        value: As ``key``.
        query_lengths: Queries of each document, the last positions of its keys; the operator takes their running sum.
        key_lengths: Keys of each document.
        scale: Of the scores.
        window: See :func:`causal_attention`.

    Returns:
        ``[queries, 1, heads x dim]``.

    Source: as :func:`causal_attention`. Not run on an NPU yet.
    """
    import torch_npu

    context: Tensor = torch_npu.npu_fusion_attention(
        query[:, 0],
        key[:, 0],
        value[:, 0],
        query.shape[2],
        "TND",
        atten_mask=_compressed_mask(query.device),
        scale=scale,
        actual_seq_qlen=list(itertools.accumulate(query_lengths)),
        actual_seq_kvlen=list(itertools.accumulate(key_lengths)),
        **_visible(window),
    )[0]
    return context.flatten(1)[:, None]


def _visible(window: int | None) -> dict[str, int]:
    """Arguments of ``npu_fusion_attention``: all keys up to each query's own, or the last ``window`` of them."""
    if window is None:
        return {"sparse_mode": _RIGHT_DOWN_CAUSAL}
    return {"sparse_mode": _BAND, "pre_tockens": window - 1, "next_tockens": 0}


@functools.cache
def _compressed_mask(device: torch.device) -> Tensor:
    """What the operator wants for every length: True where a score is dropped."""
    ones = torch.ones(_COMPRESSED_MASK_SIZE, _COMPRESSED_MASK_SIZE, dtype=torch.bool, device=device)
    return ones.triu(1)
