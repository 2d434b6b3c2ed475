"""Time and memory of preparing many pairs: cold, resumed after a kill, warm, and the order of an epoch.

    python -m scripts.scale_data --pairs 1000000 --workers 1 2
    python -m scripts.scale_data --pairs 20000 --repeat 20 --workers 1

Each step runs in a process of its own. "Anonymous" memory is what the process itself holds at the end; the
memory-mapped cache file is shared by the ranks of a host, and the system can drop it. Seconds are those after the
imports. Prints a table for docs/scaling.md.
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
STAGES = ("digest", "tokenise", "merge", "verify", "report")


def write_pairs(path: Path, number: int, repeat: int) -> None:
    """Pairs of three lines of about 50 characters, all different, the line of each ``repeat`` times."""
    with path.open("w", encoding="utf-8") as file:
        for index in range(number):
            start = index % len(TEXT)
            words = TEXT[start:] + TEXT[:start]
            parts = (f"{index}: {words[:60]}?", f"{words[:40]}.", f"no {words[:30]}.")
            prompt, chosen, rejected = (" ".join([part] * repeat) for part in parts)
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")


def _prepare(folder: str, workers: int) -> tuple[Any, dict[str, float]]:
    """The data set, and seconds of each stage."""
    from mindspeed_simpo.config.config import Config
    from mindspeed_simpo.data.dataset import dataset_of, preparations_of
    from mindspeed_simpo.data.tokenizer import load_tokenizer

    config = Config(
        model_name_or_path=str(MODEL),
        data_path=f"{folder}/pairs.jsonl",
        data_cache_dir=f"{folder}/cache{workers}",
        seq_length=4096,
    )
    tokenizer = load_tokenizer(str(MODEL), None)
    seconds = dict.fromkeys(STAGES, 0.0)

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = work()
        seconds[stage] += time.perf_counter() - begin
        return result

    [work] = timed("digest", lambda: preparations_of(config, tokenizer, "train", None))
    table = timed("verify", work.load)
    if table is None:
        timed("tokenise", lambda: work.tokenise_share(0, 1, num_workers=workers, progress=False))
        table = timed("merge", work.merge)
    return timed("report", lambda: dataset_of(config, "train", [work], [table])), seconds


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _import() -> dict[str, float]:
    from mindspeed_simpo.data import loader, together  # noqa: F401

    return {}


def _load(folder: str, workers: int) -> dict[str, float]:
    _import()
    dataset, seconds = _prepare(folder, workers)
    return seconds | {"tokens": float(dataset.lengths.sum() / len(dataset))}


def _order(folder: str, workers: int) -> dict[str, float]:
    from mindspeed_simpo.data.batching import Batching
    from mindspeed_simpo.data.loader import PairLoader

    dataset, seconds = _prepare(folder, workers)
    batching = Batching("prefix_shared", 1, max_tokens=4096)
    common = {"seed": 42, "global_batch_size": 128, "batching": batching}
    loader = PairLoader(dataset, data_parallel_rank=0, data_parallel_size=1, **common)
    begin = time.perf_counter()
    loader.train_step(0)
    first = time.perf_counter()
    for step in range(1, 101):
        loader.train_step(loader.consumed_pairs(step))
    return seconds | {"order": first - begin, "step": (time.perf_counter() - first) / 100}


def _run(work: Callable[..., dict[str, float]], arguments: tuple[Any, ...], results: Any) -> None:
    values = work(*arguments)
    results.put(values | {"anonymous": _kilobytes("RssAnon") / 1024, "resident": _kilobytes("VmRSS") / 1024})


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--repeat", type=int, default=1, help="makes pairs so many times longer")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.jsonl"
        write_pairs(data, options.pairs, options.repeat)
        rows.append(("imports alone", measured(_import)))
        rows += [(f"cold, {workers} processes", measured(_load, folder, workers)) for workers in options.workers]
        last = options.workers[-1]
        (cache,) = Path(folder, f"cache{last}", "tokenised").iterdir()
        sizes = data.stat().st_size / 2**20, cache.stat().st_size / 2**20
        cache.unlink()
        measured(_load, folder, last, stop_after=rows[-1][1]["tokenise"] / 2)
        rows.append((f"cold, {last} processes, after a kill at half the time", measured(_load, folder, last)))
        rows.append(("warm", measured(_load, folder, last)))
        rows.append(("warm, and 101 batches of an epoch", measured(_order, folder, last)))
    out = sys.stdout.write
    found = versions()
    cores = len(os.sched_getaffinity(0))
    size = " MiB, ".join(f"{name} file {size:.0f}" for name, size in zip(("data", "cache"), sizes, strict=True))
    out(f"{options.pairs:,} pairs of {rows[1][1]['tokens']:.0f} tokens, {size} MiB; {processor()}, {cores} cores, ")
    out(f"Python {found['python']}, transformers {found['transformers']}, {found['date']}\n\n")
    head = (*(f"{stage}, s" for stage in STAGES), "anonymous, MiB", "resident, MiB")
    out(f"| step | {' | '.join(head)} |\n{'|---' * (len(head) + 1)}|\n")
    for name, values in rows:
        seconds = " | ".join(f"{values[stage]:.1f}" if values.get(stage) else "" for stage in STAGES)
        out(f"| {name} | {seconds} | {values['anonymous']:.0f} | {values['resident']:.0f} |\n")
    final = rows[-1][1]
    out(f"\nFirst batch of an epoch, with its order: {final['order']:.2f} s; a further batch of 128 pairs: ")
    out(f"{1000 * final['step']:.1f} ms.\n")


if __name__ == "__main__":
    main()
