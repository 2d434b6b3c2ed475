"""The oracle's rotary embedding: every kind of scaling, for one sequence, in fp64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Config = Mapping[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"


def head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _rotary_options(config: Config, layer_type: str) -> dict[str, Any]:
    """``rope_theta``, ``rope_type`` and what the type takes, for the layers of one type."""
    family, written = config["model_type"], config.get("rope_parameters")
    if written:
        rope = dict(written.get(layer_type) or written)
    elif family == "gemma3_text" and layer_type == SLIDING:
        rope = {"rope_theta": config.get("rope_local_base_freq", 1e4)}
    else:
        theta = config.get("rope_theta", 1e6 if family == "gemma3_text" else 1e4)
        rope = {"rope_theta": theta, **(config.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    # Phi-3's first checkpoints call it "su" or "yarn"
    rope["rope_type"] = "longrope" if family == "phi3" and kind in ("su", "yarn") else kind
    rope.setdefault(
        "partial_rotary_factor", config.get("partial_rotary_factor", 0.5 if family.startswith("glm4") else 1.0)
    )
    longest = config["max_position_embeddings"]
    inside = rope.get("original_max_position_embeddings", 4096 if family == "phi3" else longest)
    rope["original_max_position_embeddings"] = config.get("original_max_position_embeddings", inside)
    rope["max_position_embeddings"] = longest
    return rope


def _yarn(rope: Mapping[str, Any], frequencies: Tensor, dim: int) -> tuple[Tensor, float]:
    # arXiv:2309.00071: a pair of dimensions that turns beta_fast times or more in the original context keeps its
    # frequency, one that turns beta_slow times or fewer gets a factor-th of it, with a linear ramp over pairs between
    factor, original = rope["factor"], rope["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    first, last = pair_that_turns(rope.get("beta_fast") or 32), pair_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = (last - first) or 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - first) / width).clamp(0, 1)

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    attention = rope.get("attention_factor")
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    return frequencies * (1 - ramp + ramp / factor), magnitude(1.0) if attention is None else attention


def _longrope(rope: Mapping[str, Any], frequencies: Tensor, length: int) -> tuple[Tensor, float]:
    # arXiv:2402.13753: every pair of dimensions has its own divisor, one set for sequences within the original
    # context and one for longer ones; attention is scaled alike in both
    original = rope["original_max_position_embeddings"]
    divisors = rope["long_factor" if length > original else "short_factor"]
    factor = rope.get("factor") or rope["max_position_embeddings"] / original
    attention = rope.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return frequencies / torch.tensor(divisors, dtype=torch.float64), attention


def _llama3(rope: Mapping[str, Any], frequencies: Tensor) -> Tensor:
    # wavelengths that the original context saw at least high_freq_factor times stay, those that it saw fewer than
    # low_freq_factor times are stretched by factor, and between them the frequency is interpolated
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / rope["factor"]


def rotation(config: Config, layer_type: str, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each position's angles, times the attention factor, each [length, rotated dims / 2]."""
    rope = _rotary_options(config, layer_type)
    dim, theta, kind = int(head_dim(config) * rope["partial_rotary_factor"]), rope["rope_theta"], rope["rope_type"]
    dim = config.get("qk_rope_head_dim", dim)
    if kind == "dynamic":
        # "NTK": a sequence longer than the model's context raises the base until the slowest pair fits
        context = rope["max_position_embeddings"]
        theta *= (rope["factor"] * max(length, context) / context - (rope["factor"] - 1)) ** (dim / (dim - 2))
    frequencies, attention = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim), 1.0
    if kind == "linear":
        frequencies = frequencies / rope["factor"]
    elif kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    elif kind == "yarn":
        frequencies, attention = _yarn(rope, frequencies, dim)
    elif kind == "longrope":
        frequencies, attention = _longrope(rope, frequencies, length)
    elif kind not in ("default", "dynamic"):
        raise ValueError(f"rope_type {kind!r}")
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return attention * angles.cos(), attention * angles.sin()


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Turn pairs among the first dimensions of each head by its position's angle; ``heads`` [seq, head, dim].

    The pairs are (i, i + rotated / 2), or (2 i, 2 i + 1) where ``interleaved``; dimensions beyond them stay.
    """
    cos, sin = (part[:, None] for part in rotation)
    half = cos.shape[-1]
    turned, kept = heads[..., : 2 * half], heads[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).transpose(-1, -2)
    first, second = pairs.unbind(-1)
    pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    turned = pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)
    return torch.cat((turned, kept), dim=-1)
