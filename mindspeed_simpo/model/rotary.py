"""Rotary position embeddings, computed from positions: context-parallel slices and packed rows bring their own."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mindspeed_simpo.model.description import Rotation


class RotationTables(NamedTuple):
    """Cosines and sines of one micro-batch's positions, in the compute dtype; both numbers of a pair have the same."""

    cosines: Float[Tensor, "seq row_or_1 1 dims"]
    sines: Float[Tensor, "seq row_or_1 1 dims"]


def inverse_frequencies(
    rotation: Rotation, lengths: Int[Tensor, " sequence"] | None = None
) -> Float[Tensor, " half"] | Float[Tensor, "sequence half"]:
    r"""``theta^(-2i / dims)`` for i in 0..dims/2-1, scaled, radians per token, fp32.

    ``linear`` divides all by ``factor``. ``llama3`` divides those of a wavelength above
    ``original_length / low_freq_factor`` by ``factor``, keeps those below ``original_length / high_freq_factor`` and
    blends linearly in between. ``yarn`` does so between those that turn ``beta_slow`` and ``beta_fast`` times in
    ``original_length`` tokens, linearly in i. ``dynamic`` raises theta by
    ``(factor n / original_length - factor + 1)^(dims / (dims - 2))`` for a sequence of n tokens beyond
    ``original_length``. ``longrope`` divides by ``long_factors`` for such a sequence, else by ``short_factors``.

    Args:
        rotation: What is asked.
        lengths: int64 tokens of each sequence; where the rotation depends on them, and then there is a row for each.

    Source: ``modeling_rope_utils`` of transformers, for each sequence alone.
    """
    device = lengths.device if lengths is not None else None
    exponents = torch.arange(0, rotation.dims, 2, dtype=torch.int64, device=device).to(torch.float32) / rotation.dims
    if rotation.kind == "dynamic":
        assert lengths is not None, "the length of every sequence is needed"
        longer = lengths.clamp(min=int(rotation.original_length)).to(torch.float32)
        stretch = rotation.factor * longer / rotation.original_length - (rotation.factor - 1)
        base = rotation.theta * stretch ** (rotation.dims / (rotation.dims - 2))
        return 1.0 / (base[:, None] ** exponents)
    if rotation.kind == "longrope":
        assert lengths is not None, "the length of every sequence is needed"
        short, long = (
            1.0 / (torch.tensor(factors, dtype=torch.float32, device=device) * rotation.theta**exponents)
            for factors in (rotation.short_factors, rotation.long_factors)
        )
        return torch.where((lengths > rotation.original_length)[:, None], long, short)
    frequencies = 1.0 / (rotation.theta**exponents)
    if rotation.kind == "linear":
        return frequencies / rotation.factor
    if rotation.kind == "llama3":
        turns = rotation.original_length * frequencies / (2 * math.pi)
        kept = (turns - rotation.low_freq_factor) / (rotation.high_freq_factor - rotation.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        return (1 - kept) * frequencies / rotation.factor + kept * frequencies
    if rotation.kind == "yarn":
        low, high = _yarn_range(rotation)
        divided = ((torch.arange(rotation.dims // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        return divided * frequencies / rotation.factor + (1 - divided) * frequencies
    return frequencies


def _yarn_range(rotation: Rotation) -> tuple[float, float]:
    """The i up to which frequencies stay, and the i from which they are divided."""

    def place(turns: float) -> float:
        wavelengths = rotation.original_length / (turns * 2 * math.pi)
        return rotation.dims * math.log(wavelengths) / (2 * math.log(rotation.theta))

    low, high = place(rotation.beta_fast), place(rotation.beta_slow)
    if rotation.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, rotation.dims - 1.0)
    return low, high + 0.001 if low == high else high


def rotation_tables(
    rotation: Rotation,
    frequencies: Float[Tensor, " half"] | Float[Tensor, "row_or_seq half"],
    positions: Int[Tensor, " seq"] | Int[Tensor, "row seq"],
    dtype: torch.dtype,
) -> RotationTables:
    """``attention_factor`` times cosine and sine of ``position x frequency``.

    Args:
        rotation: Says how pairs lie in a head.
        frequencies: Of :func:`inverse_frequencies`, on the device of the positions; with two axes for each row of
            many, or for each position of one row.
        positions: Of each token in its own document; one row where all rows share them.
        dtype: Of the result; computed in fp32.
    """
    rows = positions if positions.dim() == 2 else positions[None]
    if frequencies.dim() == 2:
        # one row of positions: of every position of a packed row, or of every padded row
        packed = len(rows) == 1 and len(frequencies) == rows.shape[1]
        frequencies = frequencies[:, None] if packed else frequencies[None]
    angles = rows.t().to(torch.float32)[:, :, None] * frequencies
    angles = angles.repeat_interleave(2, dim=-1) if rotation.interleaved else torch.cat((angles, angles), dim=-1)
    angles = angles[:, :, None, :]
    cosines, sines = angles.cos(), angles.sin()
    if rotation.attention_factor != 1.0:
        cosines, sines = cosines * rotation.attention_factor, sines * rotation.attention_factor
    return RotationTables(cosines.to(dtype), sines.to(dtype))
