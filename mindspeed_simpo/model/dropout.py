"""Dropout of the inputs of adapters: the mask of an element is a hash of what the element is.

An element is an input feature of a projection, for a token of a pair, in an optimizer step of a seed. Nothing else
enters its mask, so that layouts, forms of batches, pair schedules and recomputation all have the same masks. The hash
is integer arithmetic without overflow, which every device computes alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Words = TypeVar("Words", int, Tensor)
Multiply = Callable[[Tensor, Tensor], Tensor]

_BITS = 32
_WORD = (1 << _BITS) - 1
_START = 0x9E3779B9
ELEMENTS = 1 << 22
"""Elements that are hashed at a time, 8 bytes each."""


class TokenKeys(NamedTuple):
    """Keys of the tokens of a pass on one rank, int64 numbers of 32 bits, in the order ``[seq, row]`` flattened."""

    whole: Int[Tensor, " token"]
    """Of this context-parallel rank."""
    held: Int[Tensor, " held"]
    """Of this rank's shard of the sequence."""


def mixed(words: Words) -> Words:
    """A bijection of numbers of 32 bits that spreads each bit over all; int64 where a tensor.

    The factors have less than 32 bits, so that no product exceeds 63 bits.
    """
    words = words ^ (words >> 16)
    words = (words * 0x21F0AAAD) & _WORD
    words = words ^ (words >> 15)
    words = (words * 0x7FEB352D) & _WORD
    return words ^ (words >> 15)


def step_key(seed: int, step: int) -> int:
    """Key of an optimizer step.

    Args:
        seed: Of the run, of at most 32 bits.
        step: Number of the step, from 0, of at most 32 bits.
    """
    return mixed(mixed(_START ^ seed) ^ step)


def token_keys(identities: Int[Tensor, "*shape"], key: int) -> Int[Tensor, "*shape"]:
    """Key of each token in a step.

    Args:
        identities: See :class:`~mindspeed_simpo.batch.PairBatch`.
        key: Of the step.
    """
    low, high = identities & _WORD, (identities >> _BITS) & _WORD
    return mixed(mixed(low ^ key) ^ high)


def projection_word(name: str) -> int:
    """32 bits of the digest of a projection's Hugging Face name, which has the number of the layer in it."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def feature_keys(features: Int[Tensor, " feature"]) -> Int[Tensor, " feature"]:
    """Key of each input feature, from its index in the whole projection."""
    return mixed(features ^ _START)


@dataclass(frozen=True)
class InputDropout:
    """The masks of a rank's input features ``x``."""

    rate: float
    """Probability of a zero."""
    features: Int[Tensor, " feature"]
    """Of :func:`feature_keys`."""

    def product(
        self, multiply: Multiply, rows: Float[Tensor, "*row feature"], factor: Tensor, keys: Int[Tensor, " row"]
    ) -> Float[Tensor, "*row out"]:
        """``multiply(mask rows, factor)``, without the factor ``1 / (1 - rate)``.

        The backward computes the masked rows again: ``rows`` is saved, whatever number of projections it enters.

        Args:
            multiply: The product.
            rows: Inputs.
            factor: Second argument of ``multiply``.
            keys: Of the token of each row and of the projection.
        """

        def product(rows: Tensor, factor: Tensor) -> Tensor:
            return multiply(self.masked(rows, keys), factor)

        result: Tensor = checkpoint(product, rows, factor, use_reentrant=False, preserve_rng_state=False)
        return result

    def masked(self, rows: Float[Tensor, "*row feature"], keys: Int[Tensor, " row"]) -> Float[Tensor, "*row feature"]:
        """``mask rows``; arguments as those of :meth:`product`."""
        return rows.masked_fill(self._zeros(keys).view(rows.shape), 0)

    def _zeros(self, keys: Int[Tensor, " row"]) -> Tensor:
        least = int(self.rate * 2**_BITS)
        parts = torch.split(keys, max(1, ELEMENTS // len(self.features)))
        return torch.cat([mixed(part[:, None] ^ self.features) < least for part in parts])
