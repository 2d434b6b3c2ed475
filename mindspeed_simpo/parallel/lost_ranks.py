"""Which rank is lost, once a collective has failed: each rank whose collective failed reports to a shared store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from mindspeed_simpo.errors import PeerLostError

GRACE_S = 5.0
"""Seconds within which the collectives of the other surviving ranks fail too."""


def unresponsive_ranks(grace_s: float = GRACE_S) -> list[int]:
    """Ranks that did not call this function within ``grace_s`` seconds; empty where the store cannot be reached.

    Ranks report through the key-value store of the rendezvous, which needs no collective.

    Args:
        grace_s: Seconds to wait for the other ranks.
    """
    if not dist.is_initialized():
        return []
    rank, world_size = dist.get_rank(), dist.get_world_size()
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"alive/{rank}", "1")
        deadline = time.monotonic() + grace_s
        missing = list(range(world_size))
        while missing and time.monotonic() < deadline:
            missing = [other for other in missing if not store.check([f"alive/{other}"])]
            time.sleep(0.1)
    except (RuntimeError, ValueError):  # the rank that served the store has ended
        return []
    return missing


def is_peer_failure(error: BaseException) -> bool:
    """Whether ``error`` is that of a collective whose peer ended or hangs; for gloo only the message shows this."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("gloo", "Connection closed by peer"))


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Replace the error of a failed collective by one that names the lost ranks.

    The process groups must still exist when the body raises.

    Raises:
        PeerLostError: in place of the collective's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_peer_failure(error):
            raise
        reason = str(error).splitlines()[0]
        timed_out = "timed out" in reason.lower() or "timeout" in reason.lower()
        missing = ", ".join(map(str, unresponsive_ranks()))
        how = "hangs for longer than distributed_timeout_minutes" if timed_out else "is gone"
        what = f"rank {missing} {how}" if missing else "the ranks lost each other"
        raise PeerLostError(f"{what}: {reason}", timed_out=timed_out) from error
