"""Rotary position embeddings, computed from explicit positions as context-parallel shards and packed rows need them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mindspeed_simpo.model.description import Rotation


class RotationTables(NamedTuple):
    """Cosines and sines of the positions of a micro-batch, in the compute dtype; equal for both elements of a pair."""

    cosines: Float[Tensor, "seq row_or_1 1 dims"]
    sines: Float[Tensor, "seq row_or_1 1 dims"]


def inverse_frequencies(
    rotation: Rotation, lengths: Int[Tensor, " sequence"] | None = None
) -> Float[Tensor, " half"] | Float[Tensor, "sequence half"]:
    r"""``theta^(-2i / dims)`` for i in 0..dims/2-1, scaled by ``rotation.kind``; radians per token, fp32.

    ``linear`` divides all frequencies by ``factor``. ``llama3`` divides frequencies with a wavelength above
    ``original_length / low_freq_factor`` by ``factor``, keeps those with a wavelength below
    ``original_length / high_freq_factor`` and interpolates linearly in between. ``yarn`` keeps frequencies of more than
    ``beta_fast`` turns per ``original_length`` tokens, divides those of fewer than ``beta_slow`` turns by ``factor``
    and interpolates linearly in i in between. ``dynamic`` multiplies theta by ``(factor n / original_length - factor +
    1)^(dims / (dims - 2))`` for a sequence of n tokens beyond ``original_length``. ``longrope`` divides frequency i by
    ``long_factors[i]`` for such a sequence, else by ``short_factors[i]``.

    Args:
        rotation: Kind and parameters of the rotation.
        lengths: int64 length of each sequence in tokens, which ``dynamic`` and ``longrope`` need; the result then has
            one row per sequence.

    Source: ``modeling_rope_utils`` of transformers, applied to each sequence by itself.
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
    """The i up to which frequencies are kept, and the i from which frequencies are divided by ``factor``."""

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
        rotation: ``interleaved`` and ``attention_factor`` are read.
        frequencies: Result of :func:`inverse_frequencies` on the device of the positions; with two axes, one row per
            row of the batch, or one row per position of a single packed row.
        positions: int64 position of each token in its document; one axis where all rows have the same positions.
        dtype: Dtype of the result; angles, cosines and sines are computed in fp32.
    """
    rows = positions if positions.dim() == 2 else positions[None]
    if frequencies.dim() == 2:
        # one frequency vector per position of a packed row, else one per padded row
        packed = len(rows) == 1 and len(frequencies) == rows.shape[1]
        frequencies = frequencies[:, None] if packed else frequencies[None]
    angles = rows.t().to(torch.float32)[:, :, None] * frequencies
    angles = angles.repeat_interleave(2, dim=-1) if rotation.interleaved else torch.cat((angles, angles), dim=-1)
    angles = angles[:, :, None, :]
    cosines, sines = angles.cos(), angles.sin()
    if rotation.attention_factor != 1.0:
        cosines, sines = cosines * rotation.attention_factor, sines * rotation.attention_factor
    return RotationTables(cosines.to(dtype), sines.to(dtype))
