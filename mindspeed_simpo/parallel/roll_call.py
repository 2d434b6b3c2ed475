"""Who is missing, once a collective has failed: the ranks that fail with it say so, the lost one does not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from mindspeed_simpo.errors import PeerLostError

GRACE_S = 5.0
"""How long ranks that wait in other collectives may take to fail too."""


def silent_ranks(grace_s: float = GRACE_S) -> list[int]:
    """Ranks that have not called this function too within ``grace_s`` seconds; empty where nobody can tell.

    Goes through the key-value store that the ranks met in, which needs no collective.
    """
    if not dist.is_initialized():
        return []
    rank, world_size = dist.get_rank(), dist.get_world_size()
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"roll_call/{rank}", "here")
        deadline = time.monotonic() + grace_s
        silent = list(range(world_size))
        while silent and time.monotonic() < deadline:
            silent = [other for other in silent if not store.check([f"roll_call/{other}"])]
            time.sleep(0.1)
    except (RuntimeError, ValueError):  # the store went with the rank that held it
        return []
    return silent


def lost_a_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank ended or hangs (gloo says so only in its message)."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("gloo", "Connection closed by peer"))


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Turn a collective's failure into a message that names the missing ranks; inside, the ranks must still be joined.

    Raises:
        PeerLostError: in place of the collective's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not lost_a_peer(error):
            raise
        reason = str(error).splitlines()[0]
        waited = "timed out" in reason.lower() or "timeout" in reason.lower()
        silent = ", ".join(map(str, silent_ranks()))
        how = "hangs for longer than distributed_timeout_minutes" if waited else "is gone"
        what = f"rank {silent} {how}" if silent else "the ranks lost each other"
        raise PeerLostError(f"{what}: {reason}", waited=waited) from error
