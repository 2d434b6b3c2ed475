"""Time and memory of preparing many short pairs: cold, resumed after a kill, warm, and the order of an epoch.

    python -m scripts.scale_data --pairs 1000000 --workers 1 2

Each step runs in a process of its own. "Anonymous" memory is what the process itself holds; the memory-mapped cache
file is shared by the ranks of a host, and the system can drop it. Seconds are those after the imports. Prints a table
for docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.machine import processor, versions

MODEL = Path(__file__).parents[1] / "configs" / "quickstart"
TEXT = "name the capital of a country that has no coast and say why its rivers run to another sea than you think"


def write_pairs(path: Path, number: int) -> None:
    """Pairs of about 40 tokens, all different."""
    with path.open("w", encoding="utf-8") as file:
        for index in range(number):
            start = index % len(TEXT)
            words = TEXT[start:] + TEXT[:start]
            row = {"prompt": f"{index}: {words[:60]}?", "chosen": f"{words[:40]}.", "rejected": f"no {words[:30]}."}
            file.write(json.dumps(row) + "\n")


def _prepare(folder: str, workers: int) -> Any:
    from mindspeed_simpo.config.config import Config
    from mindspeed_simpo.data.dataset import prepare_pairs
    from mindspeed_simpo.data.tokenizer import load_tokenizer

    config = Config(
        model_name_or_path=str(MODEL),
        data_path=f"{folder}/pairs.jsonl",
        data_cache_dir=f"{folder}/cache{workers}",
        num_workers=workers,
        seq_length=256,
    )
    return prepare_pairs(config, load_tokenizer(str(MODEL), None), "train", progress=False)


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _import() -> dict[str, float]:
    from mindspeed_simpo.data import loader, together  # noqa: F401

    return {}


def _load(folder: str, workers: int) -> dict[str, float]:
    _import()
    begin = time.perf_counter()
    _prepare(folder, workers)
    return {"seconds": time.perf_counter() - begin}


def _order(folder: str, workers: int) -> dict[str, float]:
    from mindspeed_simpo.data.batching import Batching
    from mindspeed_simpo.data.loader import PairLoader

    dataset = _prepare(folder, workers)
    batching = Batching("prefix_shared", 1, max_tokens=4096)
    common = {"seed": 42, "global_batch_size": 128, "batching": batching}
    loader = PairLoader(dataset, data_parallel_rank=0, data_parallel_size=1, **common)
    begin = time.perf_counter()
    loader.train_step(0)
    first = time.perf_counter()
    for step in range(1, 101):
        loader.train_step(loader.consumed_pairs(step))
    return {"seconds": first - begin, "step_seconds": (time.perf_counter() - first) / 100}


def _run(work: Callable[..., dict[str, float]], arguments: tuple[Any, ...], results: Any) -> None:
    values = work(*arguments)
    results.put(values | {"anonymous": _kilobytes("RssAnon") / 1024, "mapped": _kilobytes("RssFile") / 1024})


def measured(
    work: Callable[..., dict[str, float]], *arguments: Any, stop_after: float | None = None
) -> dict[str, float]:
    """What ``work`` returns in a new process, with its memory in MiB at the end; a process that is stopped has none."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_run, args=(work, arguments, results))
    process.start()
    if stop_after is not None:
        process.join(stop_after)
        process.kill()
        process.join()
        return {}
    values: dict[str, float] = results.get()
    process.join()
    return values


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder) / "pairs.jsonl", options.pairs)
        empty = measured(_import)
        rows.append(("imports alone", {"seconds": 0.0} | empty))
        cold = 0.0
        for workers in options.workers:
            values = measured(_load, folder, workers)
            cold = values["seconds"]
            rows.append((f"cold, {workers} processes", values))
            last = workers
        (cache,) = Path(folder, f"cache{last}", "tokenised").iterdir()
        size = cache.stat().st_size
        cache.unlink()
        measured(_load, folder, last, stop_after=cold / 2)
        rows.append((f"cold, {last} processes, after a kill at half the time", measured(_load, folder, last)))
        rows.append(("warm", measured(_load, folder, last)))
        rows.append(("first batch of an epoch", measured(_order, folder, last)))
    out = sys.stdout.write
    found = versions()
    cores = len(os.sched_getaffinity(0))
    out(f"{options.pairs:,} pairs, cache file {size / 2**20:.0f} MiB; {processor()}, {cores} cores, ")
    out(f"Python {found['python']}, transformers {found['transformers']}, {found['date']}\n\n")
    out("| step | seconds | anonymous memory, MiB | mapped, MiB |\n|---|---|---|---|\n")
    for name, values in rows:
        out(f"| {name} | {values['seconds']:.1f} | {values['anonymous']:.0f} | {values['mapped']:.0f} |\n")
    out(f"\nA further batch of 128 pairs: {1000 * rows[-1][1]['step_seconds']:.1f} ms.\n")


if __name__ == "__main__":
    main()
