"""Token ids on disk: one checksummed Arrow file for each combination of content, tokenizer and options."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from mindspeed_simpo.data.encoding import PlacedResult, Problem
from mindspeed_simpo.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_TOKENS = pa.list_(pa.int32())
_IMAGES = pa.list_(pa.struct([("path", pa.string()), ("data", pa.large_binary()), ("digest", pa.binary(32))]))
SCHEMA = pa.schema(
    [
        ("source", pa.int32()),
        ("line", pa.int64()),
        ("kind", pa.string()),
        ("message", pa.string()),
        ("prompt_ids", _TOKENS),
        ("chosen_ids", _TOKENS),
        ("rejected_ids", _TOKENS),
        ("chosen_unscored", _TOKENS),
        ("rejected_unscored", _TOKENS),
        ("prompt_cut", pa.int32()),
        ("chosen_cut", pa.int32()),
        ("rejected_cut", pa.int32()),
        ("images", _IMAGES),
    ]
)
"""``kind`` and ``message`` are null for an example that can be used; else its token columns are empty.
``images`` is null for an example without images."""

_BATCH_EXAMPLES = 1000
_BATCH_BYTES = 64 << 20
"""Bytes of image files from which a record batch has no further example."""
_DIGEST_BYTES = hashlib.sha256().digest_size
IDS = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_unscored", "rejected_unscored")
"""Columns of a pair's token ids, and of the ranges of them that are not scored."""


@dataclass(frozen=True)
class CachedTable:
    """What a cache file holds."""

    table: Any
    """Memory-mapped, of ``SCHEMA``."""
    content: str
    """Hex digest of the token ids and images of the examples that can be used, in order, and of nothing else."""

    @property
    def has_unreadable(self) -> bool:
        """Whether an image was missing or damaged, which may have been corrected since."""
        return bool(pc.any(pc.equal(self.table.column("kind"), "unreadable")).as_py())


def cache_folder(data_cache_dir: str | None) -> Path:
    """The folder of token ids and reference log-probabilities: ``data_cache_dir``, or the default one.

    Raises:
        ConfigError: where the path begins with ``~``, as the default does, and this user has no home folder.
    """
    try:
        return Path(data_cache_dir or "~/.cache/mindspeed_simpo").expanduser()
    except RuntimeError:
        raise ConfigError("data_cache_dir: this user has no home folder to keep tokenised data in; set it") from None


def read_table(path: Path, *, verified: bool = False) -> CachedTable | None:
    """The content of a cache file, or ``None`` where the file is absent or damaged.

    Args:
        path: Of the file.
        verified: Another process of this host has just verified the checksum, which reads the whole file.
    """
    try:
        if not path.is_file():
            return None
        data = pa.memory_map(str(path)).read_buffer()
        body = memoryview(data)[:-_DIGEST_BYTES]
        if data.size <= 2 * _DIGEST_BYTES:
            raise ValueError("the file is cut short")
        if not verified and hashlib.sha256(body).digest() != bytes(memoryview(data)[-_DIGEST_BYTES:]):
            raise ValueError("the checksum does not match")
        table = pa.ipc.open_file(data.slice(0, data.size - 2 * _DIGEST_BYTES)).read_all()
        if table.schema != SCHEMA:
            raise ValueError("the columns differ")
    except (OSError, ValueError, pa.ArrowException) as error:
        logger.warning("%s: damaged, tokenising again: %s", path, error)
        return None
    return CachedTable(table, bytes(body[-_DIGEST_BYTES:]).hex())


def write_batches(path: Path, batches: Iterable[Any]) -> None:
    """Write record batches of ``SCHEMA`` as a cache file, under a temporary name that is then changed.

    ``path`` is whole or absent, also with several writers.

    Raises:
        DataError: where the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise not_writable(path, error) from None
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            digest, content = hashlib.sha256(), _ContentDigest()
            sink = _HashingFile(file, digest)
            with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), SCHEMA) as writer:
                for batch in batches:
                    writer.write_batch(batch)
                    content.update(batch)
            sink.write(content.digest())
            file.write(digest.digest())
        temporary.replace(path)
    except OSError as error:
        raise not_writable(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def not_writable(path: Path, error: OSError) -> DataError:
    """The error for a cache file whose folder cannot be written."""
    return DataError(
        f"{path.parent}: cannot write tokenised data: {error.strerror or error}; "
        "set data_cache_dir to a folder that can be written"
    )


class _ContentDigest:
    """Digest of token ids and images of usable examples; how they are divided into batches does not change it."""

    def __init__(self) -> None:
        self._parts = [hashlib.sha256() for _ in range(2 * len(IDS))]
        self._images: Any = None
        self._rows = 0

    def update(self, batch: Any) -> None:
        usable = batch.filter(batch.column("kind").is_null())
        images = usable.column("images")
        for row in np.flatnonzero(images.is_valid()).tolist():
            # examples without images leave the digest as it is without the column
            self._images = self._images or hashlib.sha256()
            digests = [image["digest"] for image in images[row].as_py()]
            self._images.update(b"".join([f"{self._rows + row} {len(digests)} ".encode(), *digests]))
        self._rows += usable.num_rows
        for name, lengths, ids in zip(IDS, self._parts[::2], self._parts[1::2], strict=True):
            column = usable.column(name)
            lengths.update(column.value_lengths().to_numpy().tobytes())
            ids.update(column.flatten().to_numpy().tobytes())

    def digest(self) -> bytes:
        parts = [*self._parts, *([self._images] if self._images is not None else [])]
        return hashlib.sha256(b"".join(part.digest() for part in parts)).digest()


class _HashingFile:
    """The writable file that Arrow needs; everything written also updates a digest."""

    closed = False

    def __init__(self, file: Any, digest: Any) -> None:
        self._file = file
        self._digest = digest

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return int(self._file.write(data))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        pass


def batches_of(results: Iterable[PlacedResult]) -> Iterator[Any]:
    """Record batches of ``SCHEMA``."""
    rows: list[dict[str, Any]] = []
    size = 0
    for result in results:
        rows.append(_columns(result))
        size += sum(len(image["data"] or b"") for image in rows[-1]["images"] or ())
        if len(rows) == _BATCH_EXAMPLES or size >= _BATCH_BYTES:
            yield pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
            rows, size = [], 0
    if rows:
        yield pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def _columns(result: PlacedResult) -> dict[str, Any]:
    columns: dict[str, Any] = {"source": result.source, "line": result.number}
    if isinstance(result.value, Problem):
        empty: dict[str, Any] = {key: [] for key in IDS}
        cuts = dict.fromkeys(("prompt_cut", "chosen_cut", "rejected_cut"), 0)
        return {**columns, "kind": result.value.kind, "message": result.value.message, **empty, **cuts, "images": None}
    images = [vars(image) for image in result.value.images] or None
    return {**columns, **vars(result.value), "images": images}
