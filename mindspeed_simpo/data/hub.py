"""Hugging Face hub ids: told from local paths, and whether the hub can be reached, without long retries."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy")


def exists(path: Path) -> bool:
    """Whether a path exists; False too for a name that the file system cannot hold (too long, null characters)."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def may_be_hub_id(name: str) -> bool:
    """Whether a name that is no local path can be a hub id: ``owner/name``, and no folder ``owner`` exists locally."""
    return _HUB_ID.fullmatch(name) is not None and not exists(Path(name).parent)


def unreachable() -> str | None:
    """The reason why the hub cannot be reached, or ``None``.

    ``None`` too where a proxy is configured, which resolves names itself, and in offline mode, where the hub library
    reads its local cache alone.
    """
    if constants.HF_HUB_OFFLINE or any(os.environ.get(variable) for variable in _PROXY_VARIABLES):
        return None
    url = urlsplit(constants.ENDPOINT)
    try:
        socket.getaddrinfo(url.hostname, url.port or 443)
    except OSError:
        return f"{constants.ENDPOINT} cannot be reached from here (HF_HUB_OFFLINE=1 reads the local hub cache)"
    return None
