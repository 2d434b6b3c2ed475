"""Who is missing, once a collective has failed: the ranks that fail with it say so, the lost one does not."""

from __future__ import annotations

import time

import torch.distributed as dist

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
