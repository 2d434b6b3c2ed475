"""Frozen weights in 4 bits, by bitsandbytes: every rank has them whole, at about a seventh of their size in fp32."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from mindspeed_simpo.errors import ConfigError

BYTES = 0.5625
"""Of a weight: half a byte, and a scale in fp32 for every 64 weights."""


def four_bits(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers quantizes the linear layers of a model while it is loaded, its output layer excepted.

    Args:
        compute_dtype: Of the products.

    Raises:
        ConfigError: where bitsandbytes is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("quantization: nf4 needs the package bitsandbytes: pip install 'mindspeed-simpo[nf4]'")
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
    )


def quantized_weights(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """The weights of a model that are held in 4 bits."""
    return (parameter for parameter in model.parameters() if _state(parameter) is not None)


def keep_arithmetic(model: torch.nn.Module) -> None:
    """Have evaluation compute as training does: on some CPUs bitsandbytes would repack the weights for bf16."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def copy_weight(own: Tensor, other: Tensor) -> None:
    """Copy values from one parameter to another that is sharded and quantized alike."""
    own.copy_(other)
    if _state(own) is not None:
        own.quant_state = _state(other)  # type: ignore[attr-defined]


def dequantized(weight: Tensor) -> Tensor:
    """The values of a weight: in fp32 where it is held in 4 bits, else its own."""
    state = _state(weight)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit  # type: ignore[import-not-found, unused-ignore]

    values: Tensor = dequantize_4bit(weight.data, state)
    return values.float()


def _state(weight: Tensor) -> Any:
    return getattr(weight, "quant_state", None)
