"""Ascend NPUs: the environment variables that torch_npu, HCCL and megatron-core read when they are first used."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from mindspeed_simpo.errors import ConfigError

_FOLDER = Path(__file__).parent
_HCCL_SHARE = 0.9


def is_deterministic() -> bool:
    """Whether the user asks for the same sums in the same order in every run: ``DETERMINISTIC=1``."""
    return os.environ.get("DETERMINISTIC") == "1"


def set_defaults(timeout_minutes: float | None = None) -> None:
    """Set the variables of ``ascend.env`` that the user has not set; call before torch_npu is first used.

    With ``DETERMINISTIC=1`` also those of ``ascend_deterministic.env``.

    Args:
        timeout_minutes: Timeout of the process groups. ``HCCL_EXEC_TIMEOUT`` becomes nine tenths of it, in whole
            seconds: HCCL's own time-out, whose message names the collective, then comes before torch_npu's watchdog.
    """
    for name, value in defaults("ascend").items():
        os.environ.setdefault(name, value)
    if is_deterministic():
        for name, value in defaults("ascend_deterministic").items():
            os.environ.setdefault(name, value)
    if timeout_minutes is not None:
        os.environ.setdefault("HCCL_EXEC_TIMEOUT", str(max(1, int(60 * timeout_minutes * _HCCL_SHARE))))


def defaults(name: str) -> dict[str, str]:
    """The lines ``VARIABLE=value`` of the file ``NAME.env`` beside this module."""
    return dict(re.findall(r"^(\w+)=(.*)$", (_FOLDER / f"{name}.env").read_text(), re.MULTILINE))


class CommunicatorBuffers(NamedTuple):
    """Bytes of the send buffer and the receive buffer, together, of one communicator of HCCL."""

    collective: int
    """Of a process group, for its collectives."""
    pair: int
    """Of two ranks that send messages to each other; 0 where messages use the communicator of the process group."""


def communicator_buffers() -> CommunicatorBuffers:
    """Twice ``HCCL_BUFFSIZE`` MiB (200 by default) and twice ``P2P_HCCL_BUFFSIZE`` MiB (20 by default).

    Raises:
        ConfigError: where the environment has a value that HCCL or torch_npu does not take.

    Source: ``HCCL_BUFFSIZE`` in CANN's reference of environment variables; ``P2P_HCCL_BUFFSIZE`` in torch_npu's.
    """
    return CommunicatorBuffers(_two_buffers("HCCL_BUFFSIZE", 200, 1), _two_buffers("P2P_HCCL_BUFFSIZE", 20, 0))


def _two_buffers(name: str, default: int, lowest: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or int(value) < lowest:
        raise ConfigError(f"{name}={value} in the environment: expected a whole number of MiB, at least {lowest}")
    return 2 * int(value) * 2**20
