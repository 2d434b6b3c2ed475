"""CUDA: attention of several documents in one call, by flash-attn, by PyTorch, or by FlexAttention.

Each is called as the documentation of PyTorch 2.11 to 2.13 and of flash-attn 2 describes. None has been run on a GPU
yet.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from mindspeed_simpo.batch import to_device

_SMALLEST_DOT = 16
"""Length of the vectors that a product of Triton takes at least."""
_number = itertools.count()


@dataclass(frozen=True)
class Platform:
    """What an attention kernel asks of a device and of what is installed."""

    device: str
    """Type of the device: cpu, cuda or npu."""
    torch: tuple[int, int]
    """Version of PyTorch."""
    triton: bool = False
    """Whether Triton is installed, in which FlexAttention writes its kernels."""
    flash_attn: bool = False
    """Whether flash-attn is installed."""
    capability: tuple[int, int] = (0, 0)
    """Compute capability of an NVIDIA GPU; (0, 0) for other devices."""


@functools.lru_cache(8)
def platform_of(device: torch.device) -> Platform:
    """What attention kernels find on ``device``; asks the driver once."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if device.type != "cuda":
        return Platform(device.type, (major, minor))
    nvidia = torch.version.cuda is not None and torch.cuda.is_available()
    return Platform(
        "cuda",
        (major, minor),
        triton=importlib.util.find_spec("triton") is not None,
        flash_attn=importlib.util.find_spec("flash_attn") is not None,
        capability=torch.cuda.get_device_capability(device) if nvidia else (0, 0),
    )


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of concatenated documents by ``flash_attn_varlen_func`` of the package flash-attn.

    The causal mask is aligned to the last query and the last key of each document.

    Args:
        query: ``[queries, 1, heads, dim]``, of all documents, in half precision.
        key: ``[keys, 1, groups, dim]``; ``heads / groups`` consecutive query heads share one key-value head.
        value: As ``key``.
        query_lengths: Queries of each document; they are the last positions of the document's keys.
        key_lengths: Keys of each document.
        scale: Factor of the scores ``q k^T``.
        window: Number of last keys that a query attends to, its own position included; None for all up to its own.
        softcap: ``cap(x) = softcap tanh(x / softcap)`` of the scores; None for none.

    Returns:
        ``[queries, 1, heads x dim]``.
    """
    from flash_attn import flash_attn_varlen_func

    context: Tensor = flash_attn_varlen_func(
        query[:, 0],
        key[:, 0],
        value[:, 0],
        _bounds(tuple(query_lengths), query.device),
        _bounds(tuple(key_lengths), query.device),
        max(query_lengths),
        max(key_lengths),
        softmax_scale=scale,
        causal=True,
        **({} if window is None else {"window_size": (window - 1, 0)}),
        **({} if softcap is None else {"softcap": softcap}),
    )
    return context.flatten(1)[:, None]


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """:func:`flash_attention` by PyTorch's own ``varlen_attn``, which has no soft cap.

    Source: ``torch.nn.attention.varlen`` of PyTorch 2.11 to 2.13, which calls the kernel of flash-attn 2 that PyTorch
    is built with: ``window_size`` ``(-1, 0)`` is causal, ``(w, 0)`` causal over ``w`` earlier keys and the own one. The
    kernel takes heads of a multiple of 8 elements. Key-value heads are shared since PyTorch 2.12 (``enable_gqa``);
    before, the documentation asks for as many as query heads, so that they are repeated.
    """
    from torch.nn.attention.varlen import varlen_attn

    width, repeats = query.shape[3], query.shape[2] // key.shape[2]
    q, k, v = (pad(each[:, 0], (0, -width % 8)) for each in (query, key, value))
    shared: dict[str, Any] = {}
    if repeats > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        shared["enable_gqa"] = True
    elif repeats > 1:
        k, v = (each[:, :, None].expand(-1, -1, repeats, -1).flatten(1, 2) for each in (k, v))
    context = varlen_attn(
        q,
        k,
        v,
        _bounds(tuple(query_lengths), query.device),
        _bounds(tuple(key_lengths), query.device),
        max(query_lengths),
        max(key_lengths),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **shared,
    )
    assert isinstance(context, Tensor), "a tuple is returned with return_aux"
    return context[..., :width].flatten(1)[:, None]


@functools.lru_cache(64)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 start of each document, then the end of the last one (``cu_seqlens`` of flash-attn)."""
    return to_device(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), device)


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``softmax(cap(scale q k^T)) v`` over the keys that ``mask`` shows to a query, by FlexAttention, compiled.

    Source: ``torch.nn.attention.flex_attention`` and ``torch/_inductor/kernel/flex`` of PyTorch 2.13. Scores exist one
    tile at a time. Products of fp32 are exact (``ieee``) unless ``torch.set_float32_matmul_precision`` asks for less.
    Zeros widen heads to the next power of two, as the kernel does by itself, because PyTorch has tile sizes that fit
    the shared memory for these alone. With sinks the weights of the keys are multiplied by
    ``sigmoid(logsumexp(scores) - sink)``, by way of the log-sum-exp that the kernel returns with its gradient.

    Args:
        query: ``[queries, row, heads, dim]``.
        key: ``[keys, row, groups, dim]``; ``heads / groups`` consecutive query heads share one key-value head.
        value: As ``key``.
        mask: Of ``queries`` by ``keys``; every query sees a key.
        scale: Factor of the scores.
        softcap: ``cap(x) = softcap tanh(x / softcap)``; None for no cap.
        sinks: ``[heads]``, the score of one more key of each query head, whose value is zero; None for none.

    Returns:
        ``[queries, row, heads x dim]``, of the dtype of ``query``.
    """
    width = query.shape[3]
    more = max(_SMALLEST_DOT, 1 << (width - 1).bit_length()) - width
    q, k, v = (pad(each.permute(1, 2, 0, 3), (0, more)) for each in (query, key, value))
    shapes = len(q) == 1, q.shape[1], k.shape[1], q.shape[3], q.dtype, torch.is_grad_enabled()
    context, lse = _attend(scale, softcap, sinks is not None, shapes)(q, k, v, mask)
    if sinks is not None and lse is not None:
        context = (context * torch.sigmoid(lse - sinks[:, None])[..., None]).to(query.dtype)
    return context[..., :width].permute(2, 0, 1, 3).flatten(2)


@functools.lru_cache(256)
def _attend(
    scale: float,
    softcap: float | None,
    with_lse: bool,
    shapes: tuple[Any, ...],  # noqa: ARG001 - its own code for each
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """FlexAttention with these constants, compiled for any number of queries and keys."""
    from torch.nn.attention.flex_attention import AuxRequest
    from torch.nn.attention.flex_attention import flex_attention as attention

    def cap(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor | None]:
        context, others = attention(
            query,
            key,
            value,
            score_mod=None if softcap is None else cap,
            block_mask=mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True},  # rows below 128 queries too: not the decoding kernel
            return_aux=AuxRequest(lse=with_lse),
        )
        return context, others.lse

    # torch.compile counts compilations, and the floats that it has seen change, by code object: of a float that
    # changes it would make an input, which a score_mod cannot have
    name = f"flex_attention_{next(_number)}"
    code = attend.__code__.replace(co_name=name)
    return _compiled(FunctionType(code, attend.__globals__, name, closure=attend.__closure__))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # fullgraph: an error where compilation fails or is repeated too often, never FlexAttention's dense scores
    return torch.compile(function, fullgraph=True)
