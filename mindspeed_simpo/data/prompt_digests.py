"""Which pairs have the same prompt: digests of token ids and images, so that no text is held in memory."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64

_BYTES = 8


def prompt_digests(table: Any, rows: Int64[np.ndarray, " pair"]) -> UInt64[np.ndarray, " pair"]:
    """Digest of the prompt of each row: of its token ids as they are trained, and of its images.

    Args:
        table: Of the cache's schema.
        rows: Ascending numbers of rows.
    """
    found = [b""]
    first = 0
    for batch in table.select(["prompt_ids", "images"]).to_batches():
        wanted = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + batch.num_rows)] - first
        found.append(_of_batch(batch, wanted))
        first += batch.num_rows
    return np.frombuffer(b"".join(found), np.uint64)


def _of_batch(batch: Any, rows: Int64[np.ndarray, " pair"]) -> bytes:
    prompts, images = batch.column("prompt_ids"), batch.column("images")
    starts = prompts.offsets.to_numpy()
    tokens = memoryview(prompts.values.to_numpy()).cast("B")
    size = prompts.type.value_type.bit_width // 8
    bounds = zip((size * starts[rows]).tolist(), (size * starts[rows + 1]).tolist(), strict=True)
    if images.null_count == len(images):
        return b"".join([hashlib.blake2b(tokens[begin:end], digest_size=_BYTES).digest() for begin, end in bounds])
    digests = []
    for row, (begin, end) in zip(rows.tolist(), bounds, strict=True):
        digest = hashlib.blake2b(tokens[begin:end], digest_size=_BYTES)
        for image in images[row].as_py() or ():
            digest.update(image["digest"])
        digests.append(digest.digest())
    return b"".join(digests)
