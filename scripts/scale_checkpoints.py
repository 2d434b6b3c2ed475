"""Seconds and memory of a checkpoint on each rank: the copy, the file, its digest, the verification and the reading.

    python -m scripts.scale_checkpoints --ranks 1 2 4

Random weights of a Llama of the given width; all ranks share this host's disk and cores. Prints tables for
docs/scaling.md. "Memory" is what a rank's resident memory grows by while it saves, beside the bytes of its share.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.machine import processor, versions
from tests.hf import make_checkpoint
from tests.ranks.launcher import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP, sharded optimizer": {"use_distributed_optimizer": True},
    "TP": {},
}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measured(model: str, folder: str, options: dict[str, Any]) -> dict[str, float]:
    """Runs on each rank."""
    from mindspeed_simpo.training import checkpoint
    from mindspeed_simpo.training.checkpoint.folder import record_of
    from mindspeed_simpo.training.checkpoint.writer import copied_shard
    from tests.ranks.parity import build, make_config, start

    config = make_config(model, global_batch_size=8, **options)
    groups, device = start(config)
    _, models, stepper = build(config, groups, device, 1)
    for part in models:
        for parameter in part.parameters():
            parameter.main_grad.fill_(1e-3)
    stepper.update(stepper.squared_norm())
    state = checkpoint.TrainingState(step=1, consumed_pairs=0, data_fingerprint="", config=config.model_dump())
    writer = checkpoint.CheckpointWriter(Path(folder), groups, device)
    before = _peak_bytes()
    times = [time.perf_counter()]
    copied_shard(models, stepper, groups)
    times.append(time.perf_counter())
    writer.save(state, models, stepper)
    times.append(time.perf_counter())
    memory = _peak_bytes() - before
    [saved] = checkpoint.list_checkpoints(Path(folder))
    own = saved / f"rank_{groups.world.rank():05d}.safetensors"
    times.append(time.perf_counter())
    record_of(own)
    times.append(time.perf_counter())
    checkpoint.find(folder, groups.control)
    times.append(time.perf_counter())
    checkpoint.load(saved, models, stepper, groups, device)
    times.append(time.perf_counter())
    copy, save, _, digest, verify, load = (after - first for first, after in itertools.pairwise(times))
    return {
        "bytes": own.stat().st_size,
        "memory": memory,
        "copy": copy,
        "save": save,
        "digest": digest,
        "verify": verify,
        "load": load,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    out = sys.stdout.write
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint(
            Path(folder) / "model", "llama", hidden=options.hidden, layers=options.layers, vocab_size=16_384
        )
        size = (Path(model) / "model.safetensors").stat().st_size
        found = versions()
        out(f"{size // 4 / 1e6:.0f} million parameters; {processor()}, {len(os.sched_getaffinity(0))} cores, ")
        out(f"torch {found['torch']}, {found['date']}\n\n")
        head = ("layout", "ranks", "MiB of a rank's file", "memory beyond, MiB", "copy, s", "save, s")
        out(f"| {' | '.join((*head, 'digest, s', 'verify all, s', 'read, s'))} |\n{'|---' * 9}|\n")
        for layout, keys in LAYOUTS.items():
            for ranks in options.ranks:
                if layout == "TP":
                    keys = {"tensor_model_parallel_size": ranks}
                place = str(Path(folder) / f"{layout} {ranks}")
                rows = run_ranks(_measured, ranks, model, place, keys)
                worst = {name: max(row[name] for row in rows) for name in rows[0]}
                cells = [f"{worst[name] / 2**20:.0f}" for name in ("bytes", "memory")]
                cells += [f"{worst[name]:.2f}" for name in ("copy", "save", "digest", "verify", "load")]
                out(f"| {layout} | {ranks} | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
