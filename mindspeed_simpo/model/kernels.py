"""Which kernel computes the attention: one table for all devices."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mindspeed_simpo.device import npu
from mindspeed_simpo.device.cuda import Platform, platform_of
from mindspeed_simpo.model.flex_check import check_flex_attention

logger = logging.getLogger(__name__)

Kernel = Literal[
    "npu_fusion_attention",
    "scaled_dot_product_attention",
    "flash_attn",
    "varlen_attn",
    "flex_attention",
    "per_document",
    "blockwise_attention",
]
FIRST_TORCH = (2, 11)
"""The first PyTorch whose ``varlen_attn`` has scale and window."""
_FLASH_GPUS = (8, 0)
"""Compute capability from which flash-attn 2 and Triton have kernels."""
_LARGEST_HEAD = 256
"""Elements of a head that flash-attn 2 takes, and that PyTorch has tile sizes of FlexAttention for."""
_HALF = (torch.float16, torch.bfloat16)


class Scores(NamedTuple):
    """What is asked of an attention kernel."""

    dtype: torch.dtype
    head_dim: int
    """Elements of a query head; values are padded to as many."""
    packed: bool
    """Whether a row has several documents, or else one."""
    window: bool = False
    """Of no account for packed rows: their kernels have windows."""
    softcap: bool = False
    sinks: bool = False

    @property
    def varied(self) -> bool:
        """Whether there is more than scale and causal mask."""
        return self.window or self.softcap or self.sinks


def _flash(platform: Platform, scores: Scores) -> bool:
    return scores.packed and scores.dtype in _HALF and _fits(platform, scores) and not scores.sinks


def _fits(platform: Platform, scores: Scores) -> bool:
    return platform.device == "cuda" and platform.capability >= _FLASH_GPUS and scores.head_dim <= _LARGEST_HEAD


def _flex(platform: Platform, scores: Scores) -> bool:
    installed = platform.triton and platform.torch >= FIRST_TORCH
    return installed and _fits(platform, scores) and scores.dtype in (*_HALF, torch.float32)


KERNELS: tuple[tuple[Kernel, Callable[[Platform, Scores], bool]], ...] = (
    ("npu_fusion_attention", lambda platform, _: platform.device == "npu"),
    ("scaled_dot_product_attention", lambda _, scores: not scores.packed and not scores.varied),
    ("flash_attn", lambda platform, scores: platform.flash_attn and _flash(platform, scores)),
    (
        "varlen_attn",
        lambda platform, scores: platform.torch >= FIRST_TORCH and _flash(platform, scores) and not scores.softcap,
    ),
    ("flex_attention", _flex),
    ("per_document", lambda _, scores: scores.packed),
    ("blockwise_attention", lambda _platform, _scores: True),
)
"""Kernels, the preferred one first, and whether a platform has the kernel and the kernel what is asked of it.

``per_document`` is a loop over the documents, each computed as a row that is not packed.
"""


@functools.lru_cache(256)
def attention_kernel(platform: Platform, scores: Scores) -> Kernel:
    """The first kernel of :data:`KERNELS` that computes ``scores`` on ``platform``.

    Args:
        platform: Of :func:`~mindspeed_simpo.device.cuda.platform_of`.
        scores: What is asked of the kernel.
    """
    return next(kernel for kernel, serves in KERNELS if serves(platform, scores))


def chosen_kernel(
    query: Tensor, *, packed: bool, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Kernel:
    """:func:`attention_kernel` for ``query``; on a GPU each choice is logged, when it is made first.

    FlexAttention is checked when it is chosen first, and where it fails the next kernel of the table is taken.

    Args:
        query: ``[..., dim]``.
        packed: See :class:`Scores`.
        window: Number of keys that a query attends to; None for all.
        softcap: Soft cap of the scores; None for none.
        sinks: Of each query head, the score of one more key; None for none.
    """
    if npu.is_on_npu(query):
        return "npu_fusion_attention"
    window_counts = window is not None and not packed
    scores = Scores(query.dtype, query.shape[-1], packed, window_counts, softcap is not None, sinks is not None)
    return _said(query.device, scores)


@functools.lru_cache(256)
def _said(device: torch.device, scores: Scores) -> Kernel:
    platform = platform_of(device)
    kernel = attention_kernel(platform, scores)
    if kernel == "flex_attention" and not _flex_works(device, scores._replace(packed=True, window=False)):
        platform = dataclasses.replace(platform, triton=False)
        kernel = attention_kernel(platform, scores)
    if platform.device == "cuda":
        logger.info("%s", sentence(platform, scores))
    return kernel


@functools.lru_cache(256)
def _flex_works(device: torch.device, scores: Scores) -> bool:
    try:
        check_flex_attention(device, scores.dtype, scores.head_dim, softcap=scores.softcap, sinks=scores.sinks)
    except Exception as error:  # whatever Triton, its compiler or the driver raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("FlexAttention does not do on this device what it should (%s); it is not used", reason)
        return False
    return True


def sentence(platform: Platform, scores: Scores) -> str:
    """One line for the log: what is computed by which kernel, and what another one lacks."""
    kernel = attention_kernel(platform, scores)
    parts = [part for part in ("window", "softcap", "sinks") if getattr(scores, part)]
    rows = "packed rows" if scores.packed else "rows of one document"
    asked = ", ".join([str(scores.dtype).removeprefix("torch."), f"heads of {scores.head_dim}", *parts])
    line = f"attention of {rows} ({asked}): {kernel}"
    if kernel not in ("per_document", "blockwise_attention"):
        return line
    return (
        f"{line}, the slow way. One call for all needs a GPU of compute capability {_shown(_FLASH_GPUS)} (found "
        f"{_shown(platform.capability)}), PyTorch {_shown(FIRST_TORCH)} (found {_shown(platform.torch)}), heads of at "
        f"most {_LARGEST_HEAD} and, for all but bf16 and fp16 without softcap and sinks, a Triton that compiles "
        f"FlexAttention ({'found' if platform.triton else 'not found'})"
    )


def _shown(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
