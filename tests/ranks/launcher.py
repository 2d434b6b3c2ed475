"""Plain functions as gloo ranks.

``run_ranks(fn, 4, ...)`` calls the module-level ``fn(...)`` in four processes that share a gloo world, and raises the
first failure with its traceback. Processes come from a forkserver that has torch loaded already: forking the test
process itself hangs once OpenMP threads exist, and spawning costs seconds a rank.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import tempfile
import time
import traceback
import warnings

import torch
import torch.distributed as dist

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "transformers", "tests.ranks.preload"])


def quiet_megatron():
    """megatron-core warns of absent apex and of its own deprecations, and calls collectives by old names."""
    for category in (UserWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"megatron\.core")
    for message in (r"`torch\.distributed\.\w+` is deprecated", r"`load_state_dict` is deprecated"):
        warnings.filterwarnings("ignore", category=FutureWarning, message=message)


def _rank_main(fn, rank, world_size, store, results, args, kwargs):
    os.environ.update(LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    quiet_megatron()
    # megatron-core's own RowParallelLinear calls its own function without the argument that this asks for
    warnings.filterwarnings("ignore", message="Warning: tp_group is None", category=DeprecationWarning)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        results.put((rank, None, fn(*args, **kwargs)))
        dist.barrier()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(fn, world_size, *args, timeout_s=120.0, **kwargs):
    """Run ``fn(*args, **kwargs)`` in ``world_size`` ranks; return what each returned (plain Python, numpy)."""
    with tempfile.TemporaryDirectory() as folder:
        results = _context.Queue()
        store = os.path.join(folder, "store")  # noqa: PTH118
        ranks = [
            _context.Process(target=_rank_main, args=(fn, rank, world_size, store, results, args, kwargs))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            return _collect(results, world_size, ranks, time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(results, world_size, ranks, deadline):
    values = {}
    while len(values) < world_size:
        try:
            rank, failure, value = results.get(timeout=0.5)
        except queue.Empty:
            dead = [r for r, p in enumerate(ranks) if r not in values and p.exitcode not in (None, 0)]
            if dead:
                raise AssertionError(f"ranks {dead} died without a word") from None
            if time.monotonic() > deadline:
                missing = sorted(set(range(world_size)) - set(values))
                raise AssertionError(f"ranks {missing} did not finish in time") from None
            continue
        if failure is not None:
            raise AssertionError(f"rank {rank} failed:\n{failure}")
        values[rank] = value
    return [values[rank] for rank in range(world_size)]
