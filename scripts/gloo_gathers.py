"""Whether gloo's asynchronous, coalesced all-gather destroys the heap of its process, as with torch 2.13.

    python -m scripts.gloo_gathers --form coalesced --runs 10   # some runs end with SIGABRT or SIGSEGV
    python -m scripts.gloo_gathers --form plain --runs 10       # not coalesced
    python -m scripts.gloo_gathers --form at_once --runs 10     # coalesced, and waited for where it starts

Two processes gather small tensors and send each other messages, with nothing of this package.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager
from torch.multiprocessing.spawn import ProcessExitedException, spawn

SIZES = (100, 1_400, 10_000, 40_000, 180_000)
"""Numbers of a gathered tensor."""
MESSAGE = 300


def _gather(form: str, whole: torch.Tensor, part: torch.Tensor) -> Any:
    if form == "plain":
        return dist.all_gather_into_tensor(whole, part, async_op=True)
    with _coalescing_manager(dist.group.WORLD, async_ops=True) as work:
        dist.all_gather_into_tensor(whole, part, async_op=True)
    if form == "at_once":
        work.wait()
    return work


def _exchange(rank: int, folder: str, seconds: float, form: str) -> None:
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    messages, draw, end = dist.new_group([0, 1]), random.Random(1), time.monotonic() + seconds
    while True:
        late = torch.tensor(float(time.monotonic() > end))
        dist.all_reduce(late)
        if late:
            break
        works = []
        for _ in range(8):
            whole = torch.zeros(draw.choice(SIZES))
            works.append((_gather(form, whole, whole.chunk(2)[rank]), whole))
            sent, received = torch.ones(MESSAGE), torch.empty(MESSAGE)
            works.append((dist.isend(sent, 1 - rank, group=messages), sent))
            works.append((dist.irecv(received, 1 - rank, group=messages), received))
        for work, _ in works:
            work.wait()
    dist.destroy_process_group()


def main() -> None:
    """Run, and print how each run ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=["coalesced", "plain", "at_once"], default="coalesced")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=25.0, help="of each run")
    arguments = parser.parse_args()
    for run in range(arguments.runs):
        with tempfile.TemporaryDirectory() as folder:
            try:
                spawn(_exchange, args=(folder, arguments.seconds, arguments.form), nprocs=2)  # type: ignore[no-untyped-call]
                ended = "whole"
            except ProcessExitedException as error:
                ended = str(error)
        print(f"{arguments.form}, run {run + 1}: {ended}")  # noqa: T201


if __name__ == "__main__":
    main()
