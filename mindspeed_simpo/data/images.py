"""Images of examples: read from the forms that data sets have, found beside the data file, and opened."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from mindspeed_simpo.data.problems import ExampleError, first_line, found, malformed

_DATA_URI = re.compile(r"data:[\w.+-]*/?[\w.+-]*(;[\w.+=-]+)*;base64,", re.ASCII)
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_REFERENCE_KEYS = ("bytes", "base64", "path", "url", "image")


@dataclass(frozen=True)
class ImageReference:
    """An image as an example names it: by a path, or by its own encoded bytes."""

    path: str | None
    """Absolute, or relative to the folder of the data file."""
    data: bytes | None = None
    """An encoded file, such as PNG or JPEG."""

    def __str__(self) -> str:
        return self.path if self.data is None and self.path is not None else f"{len(self.data or b'')} bytes"


@dataclass(frozen=True)
class StoredImage:
    """An image whose file was read when its example was tokenised."""

    path: str | None
    """Absolute path; ``None`` where ``data`` has the image."""
    data: bytes | None
    digest: bytes
    """SHA-256 of the encoded file."""

    def open(self) -> Image.Image:
        """The image in RGB, upright.

        Raises:
            ExampleError: where the file cannot be read, is no image, or has changed since its example was tokenised.
        """
        content = _content(self.path, self.data)
        if hashlib.sha256(content).digest() != self.digest:
            raise malformed(
                f"the image {self.path} has changed since its row was tokenised: set data_cache_dir to a new folder, "
                "or remove the cached data"
            )
        return _decoded(content, self.path)


def read_images(value: Any, where: str) -> list[ImageReference]:
    """The images of a column: one image or a list of images.

    Raises:
        ExampleError: see :func:`read_image`.
    """
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return [read_image(item, f"{where}[{index}]") for index, item in enumerate(value) if item is not None]
    return [read_image(value, where)]


def read_image(value: Any, where: str) -> ImageReference:
    """An image as a path, a ``data:`` URI, encoded bytes, or ``{"bytes": ..., "path": ...}`` as ``datasets`` stores it.

    Bytes as text are base64.

    Raises:
        ExampleError: for anything else, and for the address of a server, from which nothing is fetched.
    """
    if isinstance(value, Mapping):
        encoded: Any = value.get("bytes") or value.get("base64")
        given = [value[key] for key in _REFERENCE_KEYS if value.get(key)]
        if not given:
            raise malformed(f"{where}: expected an image with `bytes` or `path`, found {found(value)}")
        value = given[0]
        if isinstance(value, Mapping):
            return read_image(value, where)
        if isinstance(value, str) and encoded is not None and value is encoded:
            return ImageReference(None, _of_base64(value, where))
    if isinstance(value, bytes | bytearray) and value:
        return ImageReference(None, bytes(value))
    if not isinstance(value, str) or not value.strip():
        raise malformed(f"{where}: expected an image (a path, a data: URI or bytes), found {found(value)}")
    if value.startswith("data:"):
        return ImageReference(None, _of_uri(value, where))
    if value.startswith("file://"):
        return ImageReference(value.removeprefix("file://"))
    if _URL.match(value):
        raise malformed(f"{where}: {value[:80]} is an address: images are not fetched; store them beside the data file")
    return ImageReference(value)


def _of_uri(value: str, where: str) -> bytes:
    match = _DATA_URI.match(value)
    if match is None:
        raise malformed(f"{where}: a data: URI of an image must be `data:image/...;base64,...`")
    return _of_base64(value[match.end() :], where)


def _of_base64(value: str, where: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise malformed(f"{where}: the bytes of the image are not base64") from None


def _unreadable(message: str) -> ExampleError:
    return ExampleError("unreadable", message)


def store(reference: ImageReference, folder: Path | None) -> tuple[StoredImage, Image.Image]:
    """Read an image for the first time.

    Args:
        reference: Of the image.
        folder: Of the data file, for a relative path; ``None`` where the data are no file.

    Raises:
        ExampleError: where the file is missing or unreadable, or no whole image.
    """
    path = None
    if reference.data is None and reference.path is not None:
        full = Path(reference.path)
        if not full.is_absolute() and folder is None:
            raise malformed(f"the image {reference.path} is a relative path, and the data are no file")
        path = str(full if folder is None else folder.absolute() / full)
    content = _content(path, reference.data)
    return StoredImage(path, reference.data, hashlib.sha256(content).digest()), _decoded(content, path)


def _content(path: str | None, data: bytes | None) -> bytes:
    if data is not None:
        return data
    assert path is not None
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise _unreadable(f"there is no image {path}") from None
    except (OSError, ValueError) as error:
        raise _unreadable(f"the image {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _decoded(content: bytes, path: str | None) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content)) as image:
            upright = ImageOps.exif_transpose(image)
            return upright.convert("RGB")
    # the decoders of pillow raise errors of many types on damaged files
    except Exception as error:
        name = path if path is not None else f"of {len(content)} bytes"
        raise _unreadable(f"the image {name} cannot be decoded: {first_line(error)}") from None
