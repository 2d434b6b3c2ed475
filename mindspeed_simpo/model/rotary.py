"""Rotary position embeddings, computed from positions: context-parallel slices and packed rows bring their own."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mindspeed_simpo.model.description import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Float[Tensor, " half"]:
    r"""``theta^(-2i / head_dim)`` for i in 0..head_dim/2-1, scaled, radians per token, fp32.

    ``linear`` divides all by ``factor``. ``llama3`` divides those of a wavelength above
    ``original_max_position_embeddings / low_freq_factor`` by ``factor``, keeps those below
    ``original_max_position_embeddings / high_freq_factor`` and blends linearly in between.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        rotations = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        return (1 - kept) * frequencies / rope.factor + kept * frequencies
    return frequencies


def rotation_angles(
    frequencies: Float[Tensor, " half"], positions: Int[Tensor, " seq"] | Int[Tensor, "row seq"]
) -> Float[Tensor, "seq row_or_1 1 dim"]:
    """``position x frequency`` in megatron-core's layout (not interleaved: both halves hold the same), radians, fp32.

    Args:
        frequencies: Of :func:`inverse_frequencies`, on the device of the positions.
        positions: Of each token in its own document; one row where all rows share them.
    """
    rows = positions if positions.dim() == 2 else positions[None]
    angles = rows.t().to(torch.float32)[:, :, None] * frequencies
    return torch.cat((angles, angles), dim=-1)[:, :, None, :]
