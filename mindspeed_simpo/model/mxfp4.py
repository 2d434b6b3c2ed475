"""Weights in MXFP4: numbers of four bits, and a scale of eight bits for every 32 inputs of an output.

Source: OCP Microscaling Formats (MX) specification, version 1.0, section 5.3 and 5.4.1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

GROUP = 32
"""Numbers with one scale."""
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127
BLOCKS, SCALES = "_blocks", "_scales"
"""Ends of the names of the two tensors that a checkpoint has in place of a weight."""


def stored_as(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """End of the name and shape of the uint8 tensors that hold a weight ``[expert, inputs, outputs]``."""
    experts, inputs, outputs = shape
    scales = experts, outputs, inputs // GROUP
    return {BLOCKS: (*scales, GROUP // 2), SCALES: scales}


def groups_of(start: int, stop: int) -> slice:
    """The groups that hold the inputs ``start`` to ``stop - 1``."""
    return slice(start // GROUP, -(-stop // GROUP))


def dequantized(
    blocks: UInt8[Tensor, "output group pair"], scales: UInt8[Tensor, "output group"]
) -> Float[Tensor, "output input"]:
    """``number 2^(scale - 127)`` in bf16, which holds all but overflowing values exactly.

    Args:
        blocks: Two numbers a byte, the first one in the lower bits. A number is a sign, two bits of exponent and one of
            mantissa.
        scales: The exponents.
    """
    numbers = torch.tensor([*_POSITIVE, *(-each for each in _POSITIVE)])
    # [byte, number of the byte]
    pairs = torch.stack((numbers.repeat(len(numbers)), numbers.repeat_interleave(len(numbers))), dim=1)
    values = pairs[blocks.int()].flatten(-2)
    return torch.ldexp(values, scales.int()[..., None] - _BIAS).to(torch.bfloat16).flatten(-2)
