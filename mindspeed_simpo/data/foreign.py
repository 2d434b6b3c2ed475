"""Files of another format under the name of a data file, told by their first bytes."""

from __future__ import annotations

from mindspeed_simpo.errors import DataError

_MARKS = (
    (b"\x1f\x8b", "is compressed by gzip: decompress it (gunzip)"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd: decompress it (unzstd)"),
    (b"\xfd7zXZ\x00", "is compressed by xz: decompress it (unxz)"),
    (b"BZh", "is compressed by bzip2: decompress it (bunzip2)"),
    (b"PK\x03\x04", "is a zip archive: unpack it"),
    (b"PAR1", "is a Parquet table: name it .parquet"),
    (b"version https://git-lfs", "is a pointer of Git LFS, not the data: fetch the data (git lfs pull)"),
    (b"\xff\xfe\x00\x00", "is UTF-32; save it as UTF-8"),
    (b"\x00\x00\xfe\xff", "is UTF-32; save it as UTF-8"),
    (b"\xff\xfe", "is UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16; save it as UTF-8"),
)


def refuse_foreign(head: bytes, name: str) -> None:
    """Refuse a file whose first bytes are those of another format.

    Raises:
        DataError: saying which format it is and what to do.
    """
    for mark, what in _MARKS:
        if head.startswith(mark):
            raise DataError(f"{name}: the file {what}")
