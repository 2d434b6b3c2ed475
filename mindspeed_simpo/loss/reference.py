"""Log-probabilities under the reference model: computed once, before training, and cached on disk."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import DataError

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 16


@dataclass(frozen=True)
class ReferenceTable:
    """Sums of response log-probabilities under the reference model, for every example of one dataset."""

    sums: Float[Tensor, "dataset 2"]
    """Sums of the chosen and of the rejected response; nats, fp64 (fp32 on NPUs), on the device."""

    def __call__(self, pair_ids: Int[Tensor, " pair"]) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        """The chosen and the rejected sums of pairs; a filler pair gets those of example 0, which the loss discards."""
        rows = self.sums[pair_ids.clamp(min=0)]
        return rows[:, 0], rows[:, 1]


def cache_path(cache_dir: Path, dataset_fingerprint: str, model_fingerprint: str, *, bf16: bool) -> Path:
    """File of the reference sums of one dataset under one model."""
    key = hashlib.blake2b(f"{dataset_fingerprint} {model_fingerprint} bf16={bf16}".encode(), digest_size=16)
    return cache_dir / "reference" / f"{key.hexdigest()}.npy"


def read_cached(path: Path, num_pairs: int, device: Device) -> ReferenceTable | None:
    """The cached sums; None where the file does not exist, is damaged or has another number of pairs."""
    try:
        content = path.read_bytes()
        array, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        if hashlib.blake2b(array, digest_size=_DIGEST_BYTES).digest() != digest:
            raise ValueError("the digest does not match")
        sums = np.load(io.BytesIO(array), allow_pickle=False)
        if sums.shape != (num_pairs, 2):
            raise ValueError(f"shape {sums.shape}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s: damaged, computing the reference again: %s", path, error)
        return None
    return ReferenceTable(torch.from_numpy(sums).to(device.torch_device, device.reduction_dtype))


def write_cache(path: Path, table: ReferenceTable) -> None:
    """Write the sums to the cache, for the next run with the same data and model; atomic.

    Raises:
        DataError: where the folder cannot be written.
    """
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        array = io.BytesIO()
        np.save(array, table.sums.cpu().numpy(), allow_pickle=False)
        content = array.getvalue()
        temporary.write_bytes(content + hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest())
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"{path.parent}: cannot write the reference log-probabilities: {error.strerror or error}; "
            "set data_cache_dir to a folder that can be written"
        ) from None


def model_fingerprint(folder: Path, seed: int | None) -> str:
    """Digest of a Hugging Face folder's configuration and weights.

    Args:
        folder: Holds ``config.json`` and, unless ``seed`` is given, safetensors files.
        seed: Set where the weights are random, and determined by the seed and the configuration alone.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update((folder / "config.json").read_bytes())
    digest.update(f"seed={seed}".encode())
    for path in sorted(folder.glob("*.safetensors")) if seed is None else []:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
