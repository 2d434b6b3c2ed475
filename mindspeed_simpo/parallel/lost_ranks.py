"""Which rank is lost, once a collective has failed: each rank whose collective failed reports to a shared store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from mindspeed_simpo.errors import PeerLostError

GRACE_S = 5.0
"""Seconds within which the collectives of the other surviving ranks fail too."""

_PEER_FAILURES = (
    "gloo",
    "Connection closed by peer",
    # torch_npu: HCCL_CHECK_ERROR of each call, and what its watchdog sets on the work of a collective
    "HCCL function error",
    "ERR02200",
    "ERR02005",
    "Watchdog caught collective operation timeout",
    "HCCL watchdog thread terminated",
    "setting up HCCL communicator",
    "SUSPECT REMOTE ERROR",
    # CANN: a collective waits for a peer longer than HCCL_EXEC_TIMEOUT, a connection longer than HCCL_CONNECT_TIMEOUT
    "EI0002",
    "EI0006",
)


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
    """Whether ``error`` is that of a collective whose peer ended or hangs; gloo and HCCL show this in the message only.

    An HCCL call that fails for another reason, such as a wrong argument, counts too: its message has the same form.
    """
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _PEER_FAILURES)


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
        # HCCL's texts begin with an empty line
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
        timed_out = "timed out" in reason.lower() or "timeout" in reason.lower()
        missing = ", ".join(map(str, unresponsive_ranks()))
        how = "hangs for longer than distributed_timeout_minutes" if timed_out else "is gone"
        what = f"rank {missing} {how}" if missing else "the ranks lost each other"
        raise PeerLostError(f"{what}: {reason}", timed_out=timed_out) from error
