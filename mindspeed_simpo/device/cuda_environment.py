"""CUDA GPUs: the environment variables that the driver and torch read when a device is first used."""

from __future__ import annotations

import os

import torch

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Names of one variable: since torch 2.9, before, and on ROCm."""


def set_defaults(*, one_queue: bool) -> None:
    """Set the variables that the user has not set, where torch is built for GPUs; call before CUDA is first used.

    Torch's allocator gets ``expandable_segments:True``: micro-batches differ in length, and the allocator would
    fragment.

    Args:
        one_queue: Whether ``CUDA_DEVICE_MAX_CONNECTIONS`` becomes 1, so that a collective is queued ahead of the
            product that follows it, on which megatron-core relies with tensor parallelism; FSDP overlaps less with it.

    Source: "Optimizing memory usage" in PyTorch's notes on CUDA; ``tensor_parallel/layers.py`` of megatron-core and
    ``megatron/training/arguments.py`` of Megatron-LM.
    """
    if torch.version.cuda is None and torch.version.hip is None:
        return
    release = tuple(map(int, torch.__version__.split(".")[:2]))
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0 if release >= (2, 9) else 1]] = "expandable_segments:True"
    if one_queue:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
