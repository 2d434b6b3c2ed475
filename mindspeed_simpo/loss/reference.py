"""Log-probabilities under the reference model: computed once, before training, and cached on disk."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from mindspeed_simpo.errors import DataError

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 16
SHARD_PAIRS = 4096
"""Pairs of a file; what is lost at most where a run is killed."""


@dataclass(frozen=True)
class ReferenceTable:
    """Sums of response log-probabilities under the reference model, for every example of one dataset."""

    sums: Float[Tensor, "dataset 2"]
    """Sums of the chosen and of the rejected response; nats, fp64 (fp32 on NPUs), on the device. NaN where the run does
    not use the pair."""

    def __call__(self, pair_ids: Int[Tensor, " pair"]) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        """The chosen and the rejected sums of pairs; a filler pair gets those of example 0, which the loss discards."""
        rows = self.sums[pair_ids.clamp(min=0)]
        return rows[:, 0], rows[:, 1]


class StepReference:
    """Sums of the pairs of the current step under a reference that the step itself computes.

    With adapters the reference is the model without them, so that no table of the dataset is needed.
    """

    def __init__(self) -> None:
        self._ids: Tensor | None = None
        self._sums: Tensor | None = None

    def set(self, pair_ids: Int[Tensor, " step"], sums: Float[Tensor, "step 2"]) -> None:
        """Take the place of the sums of the step before.

        Args:
            pair_ids: int64 numbers of this rank's pairs; the loss discards pairs with negative numbers.
            sums: Sums of the chosen and of the rejected response, nats.
        """
        self._ids, self._sums = pair_ids, sums

    def __call__(self, pair_ids: Int[Tensor, " pair"]) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        """The chosen and the rejected sums of some pairs of the step."""
        assert self._ids is not None, "the sums of the step are set before its losses are computed"
        assert self._sums is not None, "numbers and sums are set together"
        rows = self._sums[(pair_ids[:, None] == self._ids).int().argmax(dim=1)]
        return rows[:, 0], rows[:, 1]


class ReferenceCache:
    """Sums of one dataset under one model on disk, in shards of ``SHARD_PAIRS`` pairs.

    Each shard is a file that is complete or absent. Within a shard NaN stands for a pair that no pass has scored yet.

    Args:
        cache_dir: Folder of all caches.
        dataset: Fingerprint of the dataset.
        model: Fingerprint of the reference model.
        bf16: Whether the model computes in bf16.
        num_pairs: Pairs of the dataset.
    """

    def __init__(self, cache_dir: Path, dataset: str, model: str, *, bf16: bool, num_pairs: int) -> None:
        key = hashlib.blake2b(f"{dataset} {model} bf16={bf16}".encode(), digest_size=16)
        self.folder = cache_dir / "reference" / key.hexdigest()
        self.num_pairs = num_pairs

    def read(self) -> Float64[np.ndarray, "dataset 2"]:
        """The sums of all pairs, NaN where there are none."""
        sums = np.full((self.num_pairs, 2), np.nan)
        for first in range(0, self.num_pairs, SHARD_PAIRS):
            shard = self._read_shard(first)
            if shard is not None:
                sums[first : first + SHARD_PAIRS] = shard
        return sums

    def write(self, sums: Float64[np.ndarray, "dataset 2"], pairs: Int64[np.ndarray, " pair"]) -> None:
        """Write the shards that hold ``pairs``.

        Args:
            sums: Of all pairs, as :meth:`read` returns them.
            pairs: Indices of the pairs whose sums are new.

        Raises:
            DataError: where the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for first in np.unique(pairs // SHARD_PAIRS) * SHARD_PAIRS:
                array = io.BytesIO()
                np.save(array, sums[first : first + SHARD_PAIRS], allow_pickle=False)
                content = array.getvalue()
                path = self._shard(int(first))
                temporary = path.with_suffix(f".{os.getpid()}.tmp")
                temporary.write_bytes(content + hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest())
                temporary.replace(path)
        except OSError as error:
            raise DataError(
                f"{self.folder}: cannot write the reference log-probabilities: {error.strerror or error}; "
                "set data_cache_dir to a folder that can be written"
            ) from None

    def _shard(self, first: int) -> Path:
        return self.folder / f"{first:010d}.npy"

    def _read_shard(self, first: int) -> Float64[np.ndarray, "shard 2"] | None:
        path = self._shard(first)
        try:
            content = path.read_bytes()
            array, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
            if hashlib.blake2b(array, digest_size=_DIGEST_BYTES).digest() != digest:
                raise ValueError("the digest does not match")
            sums = np.load(io.BytesIO(array), allow_pickle=False)
            if sums.shape != (min(SHARD_PAIRS, self.num_pairs - first), 2):
                raise ValueError(f"shape {sums.shape}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            logger.warning("%s: damaged, computing these sums again: %s", path, error)
            return None
        return np.asarray(sums, dtype=np.float64)


def file_digests(folder: Path, *, weights: bool, rank: int, size: int) -> dict[str, str]:
    """Digests of a rank's share of a Hugging Face folder's files: config.json, and safetensors where ``weights``.

    Args:
        folder: The model.
        weights: False where the weights are random, and determined by a seed and the configuration alone.
        rank: This rank.
        size: Number of ranks that share the work.
    """
    paths = [folder / "config.json", *(sorted(folder.glob("*.safetensors")) if weights else [])]
    digests = {}
    for path in paths[rank::size]:
        with path.open("rb") as file:
            digest = hashlib.blake2b(digest_size=16)
            while block := file.read(1 << 24):
                digest.update(block)
        digests[path.name] = digest.hexdigest()
    return digests


def model_fingerprint(digests: Mapping[str, str], seed: int | None) -> str:
    """Digest of a model, from the digests of its files and the seed of random weights, where these are random."""
    facts = json.dumps([sorted(digests.items()), seed])
    return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()
