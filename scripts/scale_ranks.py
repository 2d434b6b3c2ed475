"""Seconds and memory that grow with the number of ranks: process groups, agreement on an outcome, exchange of objects.

    python -m scripts.scale_ranks --ranks 2 4 8 16

Ranks over gloo on this host's cores, so that the seconds are upper bounds: a cluster's ranks have a core each. Prints
a table for docs/scaling.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from scripts.machine import processor, versions
from tests.ranks.launcher import run_ranks

REPEATS = 20
OBJECT_BYTES = 10_000
"""About what a rank reports of a checkpoint's or data set's files."""


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _measured(options: dict[str, Any]) -> dict[str, float]:
    """Runs on each rank."""
    import torch.distributed as dist

    from mindspeed_simpo.parallel.collectives import fail_together, of_all_ranks
    from tests.ranks.parity import make_config, start

    dist.barrier()
    before, memory = time.perf_counter(), _resident_bytes()
    groups, _ = start(make_config("unused", global_batch_size=64, **options))
    dist.barrier()
    begin, grown = time.perf_counter(), _resident_bytes() - memory
    for _ in range(REPEATS):
        with fail_together(groups.control):
            pass
    agreed = time.perf_counter()
    for _ in range(REPEATS):
        of_all_ranks(b"x" * OBJECT_BYTES, groups.control)
    end = time.perf_counter()
    return {
        "groups": begin - before,
        "memory": grown / 2**20,
        "agree": (agreed - begin) / REPEATS * 1e3,
        "exchange": (end - agreed) / REPEATS * 1e3,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    options = parser.parse_args()
    found, out = versions(), sys.stdout.write
    out(f"{processor()}, {len(os.sched_getaffinity(0))} cores, torch {found['torch']}, ")
    out(f"megatron-core {found['megatron-core']}, {found['date']}\n\n")
    head = ("ranks", "layout", "process groups, s", "memory, MiB", "agreement, ms", f"{OBJECT_BYTES} bytes of each, ms")
    out(f"| {' | '.join(head)} |\n{'|---' * len(head)}|\n")
    for ranks in options.ranks:
        layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2 if ranks >= 4 else 1}
        rows = run_ranks(_measured, ranks, layout)
        worst = {name: max(row[name] for row in rows) for name in rows[0]}
        cells = [f"{worst['groups']:.2f}", f"{worst['memory']:.0f}"]
        cells += [f"{worst[name]:.1f}" for name in ("agree", "exchange")]
        out(f"| {ranks} | {' x '.join(f'{key[0].upper()}P{value}' for key, value in layout.items())} x DP")
        out(f"{ranks // (layout['pipeline_model_parallel_size'] * 2)} | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
