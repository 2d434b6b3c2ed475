"""MindSpeed-LLM's tokenised pairs, ``PREFIX_packed_{chosen,rejected}_{input_ids,labels}_document.{bin,idx}``.

A ``.bin`` file is int32 token ids, one sequence after the other. Its ``.idx`` file is, little-endian: the magic bytes,
a version (uint64 1), the code of the dtype (uint8 4 = int32), the number of sequences and of document marks (uint64
each), the length of each sequence (int32), its offset in bytes (int64) and the document marks (int64: 0, then the
number of sequences so far after each document). In these files every sequence is a document. Labels repeat the ids,
with -100 over the prompt.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from mindspeed_simpo.batch import IGNORE_INDEX, TokenizedPair
from mindspeed_simpo.data.problems import malformed
from mindspeed_simpo.data.source import Example, Source, Survey
from mindspeed_simpo.errors import DataError

KEYS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_INT32 = 4
_Ids = npt.NDArray[np.int32]


def _path(prefix: str, key: str, suffix: str) -> Path:
    return Path(f"{prefix}_packed_{key}_document{suffix}")


def is_prefix(path: str | Path) -> bool:
    """Whether ``path`` is the prefix of tokenised pairs: whether its first file exists."""
    try:
        return _path(str(path), KEYS[0], ".idx").is_file()
    except (OSError, ValueError):  # a name that the file system cannot hold
        return False


class IndexedSource(Source):
    """The pairs of a prefix as a source: its examples are tokenised already; places are pair numbers, from 1."""

    place = "{name}:pair {number}"

    def __init__(self, prefix: Path, name: str) -> None:
        super().__init__(name)
        self._prefix = prefix

    def survey(self, piece: int) -> Survey:  # noqa: ARG002
        """See :meth:`Source.survey`."""
        digest = hashlib.sha256(b"indexed")
        for path in (_path(str(self._prefix), key, suffix) for key in KEYS for suffix in (".idx", ".bin")):
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return Survey(digest.hexdigest())

    @property
    def places(self) -> int | None:
        """See :attr:`Source.places`."""
        return len(IndexedPairs(self._prefix))

    def raw_examples(self, after: int = 0) -> Iterator[Example]:
        """See :meth:`Source.raw_examples`."""
        pairs = IndexedPairs(self._prefix)
        for index in range(after, len(pairs)):
            try:
                yield index + 1, pairs[index]
            except DataError as error:
                yield index + 1, malformed(str(error).removeprefix(f"{pairs.where(index)}: "))


class IndexedPairs(Sequence[TokenizedPair]):
    """Pairs of a prefix, memory-mapped. The constructor checks the files as a whole; reading a pair checks the pair."""

    def __init__(self, prefix: str | Path) -> None:
        """Open the four files.

        Raises:
            DataError: a file is absent, of another format or cut short, or they differ in length.
        """
        self.prefix = str(Path(prefix).expanduser())
        self._sequences = {key: _IndexedSequences(self.prefix, key) for key in KEYS}
        counts = {str(files.index_path): len(files) for files in self._sequences.values()}
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{path}: {count}" for path, count in counts.items())
            raise DataError(f"{prefix}: the files do not hold the same number of sequences ({shown})")

    def __len__(self) -> int:
        return len(self._sequences[KEYS[0]])

    def __getitem__(self, index: int | slice) -> TokenizedPair:  # type: ignore[override]
        """The pair ``index``, from 0.

        Raises:
            IndexError: outside ``0 .. len - 1``.
            DataError: labels that are not the ids with -100 over one prompt and what is not scored, or no response.
        """
        if not isinstance(index, int) or not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        where = self.where(index)
        chosen_ids, chosen_labels, rejected_ids, rejected_labels = (self._sequences[key][index] for key in KEYS)
        length = min(
            _prompt_length(chosen_ids, chosen_labels, f"{where}: chosen"),
            _prompt_length(rejected_ids, rejected_labels, f"{where}: rejected"),
        )
        prompt = chosen_ids[:length].tolist()
        if rejected_ids[:length].tolist() != prompt:
            raise DataError(f"{where}: chosen and rejected do not have the same prompt ids")
        return TokenizedPair(
            prompt,
            chosen_ids[length:].tolist(),
            rejected_ids[length:].tolist(),
            where,
            _unscored(chosen_labels[length:]),
            _unscored(rejected_labels[length:]),
        )

    def where(self, index: int) -> str:
        """Name a pair in a message, counted from 1."""
        return f"{self.prefix}:pair {index + 1}"


class _IndexedSequences:
    """One ``.bin`` with its ``.idx``."""

    def __init__(self, prefix: str, key: str) -> None:
        self.index_path, data_path = _path(prefix, key, ".idx"), _path(prefix, key, ".bin")
        try:
            index = self.index_path.read_bytes()
            data_size = data_path.stat().st_size
        except OSError as error:
            raise DataError(f"{error.filename}: cannot read the tokenised pairs: {error.strerror}") from None
        lengths, offsets = _parse_index(index, self.index_path)
        if int(lengths.sum(dtype=np.int64)) * 4 != data_size:
            raise DataError(
                f"{data_path}: expected {int(lengths.sum(dtype=np.int64)) * 4} bytes, found {data_size}; the file was "
                "cut short, or is not of this index: preprocess again"
            )
        ends = offsets // 4 + lengths
        if len(lengths) and (int(offsets.min()) < 0 or int(ends.max()) * 4 > data_size or (offsets % 4).any()):
            raise DataError(f"{self.index_path}: offsets point outside {data_path.name}: preprocess again")
        self._lengths, self._starts = lengths, offsets // 4
        # an empty file cannot be mapped
        self._ids = np.memmap(data_path, dtype="<i4", mode="r") if data_size else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> _Ids:
        start = int(self._starts[index])
        return np.asarray(self._ids[start : start + int(self._lengths[index])])


def _parse_index(index: bytes, path: Path) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    if len(index) < _HEADER.size or not index.startswith(_MAGIC):
        raise DataError(f"{path}: not an index of Megatron's indexed datasets")
    _, version, dtype, sequences, marks = _HEADER.unpack_from(index)
    if (version, dtype) != (1, _INT32):
        raise DataError(
            f"{path}: expected version 1 and int32 ids (code {_INT32}), found version {version}, code {dtype}"
        )
    expected = _HEADER.size + 12 * sequences + 8 * marks
    if len(index) != expected:
        raise DataError(f"{path}: expected {expected} bytes, found {len(index)}; preprocess again")
    lengths = np.frombuffer(index, "<i4", sequences, _HEADER.size)
    offsets = np.frombuffer(index, "<i8", sequences, _HEADER.size + 4 * sequences)
    return lengths, offsets


def _prompt_length(ids: _Ids, labels: _Ids, where: str) -> int:
    scored = np.flatnonzero(labels != IGNORE_INDEX)
    if not len(scored):
        raise DataError(f"{where} has no response token: every label is {IGNORE_INDEX}")
    first = int(scored[0])
    if len(ids) != len(labels) or not np.array_equal(ids[scored], labels[scored]):
        raise DataError(
            f"{where}: expected labels that repeat the ids, with {IGNORE_INDEX} where a token is not scored"
        )
    return first


def _unscored(labels: _Ids) -> list[int]:
    """First and stop index of each range of ignored labels, end to end."""
    ignored = np.concatenate([[False], labels == IGNORE_INDEX, [False]])
    return [int(index) for index in np.flatnonzero(ignored[1:] != ignored[:-1])]


def write_indexed_pairs(prefix: str | Path, pairs: Iterable[TokenizedPair]) -> int:
    """Write pairs as MindSpeed-LLM's ``preprocess_data.py`` writes them, byte for byte.

    Args:
        prefix: As ``--output-prefix`` of ``preprocess_data.py``, and ``--data-path`` of the training.
        pairs: In order; read once.

    Returns:
        The number of pairs.

    Raises:
        DataError: where the files cannot be written; files that an earlier run wrote are then unchanged.
    """
    prefix = str(Path(prefix).expanduser())
    lengths: dict[str, list[int]] = {key: [] for key in KEYS}
    try:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files = {key: stack.enter_context(_unfinished(_path(prefix, key, ".bin")).open("wb")) for key in KEYS}
            for pair in pairs:
                for key, ids in _sequences(pair).items():
                    files[key].write(np.asarray(ids, dtype="<i4").tobytes())
                    lengths[key].append(len(ids))
        for key in KEYS:
            with _unfinished(_path(prefix, key, ".idx")).open("wb") as file:
                _write_index(file, np.asarray(lengths[key], dtype="<i4"))
        for path in (_path(prefix, key, suffix) for key in KEYS for suffix in (".bin", ".idx")):
            _unfinished(path).replace(path)
    except OSError as error:
        raise DataError(f"{error.filename or prefix}: cannot write the tokenised pairs: {error.strerror}") from None
    return len(lengths[KEYS[0]])


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _sequences(pair: TokenizedPair) -> dict[str, list[int]]:
    ignored = [IGNORE_INDEX] * len(pair.prompt_ids)
    return {
        "chosen_input_ids": pair.prompt_ids + pair.chosen_ids,
        "chosen_labels": ignored + pair.chosen_targets,
        "rejected_input_ids": pair.prompt_ids + pair.rejected_ids,
        "rejected_labels": ignored + pair.rejected_targets,
    }


def _write_index(file: BinaryIO, lengths: npt.NDArray[np.int32]) -> None:
    count = len(lengths)
    file.write(_HEADER.pack(_MAGIC, 1, _INT32, count, count + 1))
    file.write(lengths.tobytes())
    ends = np.cumsum(lengths, dtype="<i8") * 4
    file.write(np.concatenate([np.zeros(min(count, 1), "<i8"), ends[:-1]]).astype("<i8").tobytes())
    file.write(np.arange(count + 1, dtype="<i8").tobytes())
