"""Pairs per second, memory and arithmetic rate of every way to run a step, and of other trainers, side by side.

Every variant is a separate process that runs the tool's public entry point (`mindspeed-simpo train`, TRL's
`CPOTrainer`, `llamafactory-cli train`) with the same model, pairs, order, precision and threads. Variants take turns;
the first steps of a run are left out.

    python -m scripts.bench --data pairs.json                       # our own variants
    python -m scripts.bench --data pairs.json --trl-python PATH     # and TRL, which that interpreter can import
    python -m scripts.bench --data pairs.json --name cpu_10m        # and write docs/benchmarks/cpu_10m.{json,md}
    python -m scripts.bench --data pairs.json --variants adapters   # adapters beside the training of all weights
    python -m scripts.bench --data pairs.json --variants backends   # backend: fsdp beside backend: megatron
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts import bench_inputs
from scripts.bench_variants import SETS
from scripts.machine import processor, versions

DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    """Measure, print and write ``docs/benchmarks/NAME.json`` and ``NAME.md``."""
    arguments = _parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inputs = bench_inputs.prepare(Path(folder), arguments)
        result = {
            "machine": {
                "processor": processor(),
                "cores": os.cpu_count(),
                "threads": arguments.threads,
                "load_average_at_start": round(os.getloadavg()[0], 1),
                "matmul_flops_per_second": _matmul_rate(arguments.threads),
            },
            "versions": versions(),
            "set": arguments.variants,
            "inputs": inputs.facts,
            **_measure(arguments, inputs),
        }
    result["machine"]["load_average_at_end"] = round(os.getloadavg()[0], 1)
    _add_ratios(result)
    _print(result)
    if arguments.name:
        path = DOCS / "benchmarks" / arguments.name
        path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(_markdown(result), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help="preference pairs, in any form that training takes")
    parser.add_argument("--pairs", type=int, default=48, help="pairs to train on: the first that fit")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="pairs a step")
    parser.add_argument("--seq-length", type=int, default=1024, help="longest sequence, tokens; others are left out")
    parser.add_argument("--hidden", type=int, default=320)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--kv-heads", type=int, default=5)
    parser.add_argument("--intermediate", type=int, default=864)
    parser.add_argument("--vocab", type=int, default=16384, help="of the tokenizer, which is trained on the pairs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=2, help="steps left out")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each variant")
    parser.add_argument("--variants", choices=SETS, default="levers", help="what is measured")
    parser.add_argument("--only", nargs="*", help="variants, by name")
    parser.add_argument("--trl-python", help="interpreter that can import trl")
    parser.add_argument("--llamafactory-python", help="interpreter that can import llamafactory")
    parser.add_argument("--name", help="write docs/benchmarks/NAME.json and NAME.md")
    return parser


def _matmul_rate(threads: int) -> float:
    """fp32 multiply-adds x 2 a second of a square product, the best of some: what this machine's library reaches."""
    import torch

    torch.set_num_threads(threads)
    size = 2048
    left, right = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(8):
        begin = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


def _measure(arguments: argparse.Namespace, inputs: bench_inputs.Inputs) -> dict[str, dict[str, Any]]:
    """What was seen of each variant, and why the others did not run."""
    interpreters = dict.fromkeys(("trl", "trl_dpo"), arguments.trl_python)
    interpreters["llamafactory"] = arguments.llamafactory_python
    wanted = SETS[arguments.variants]
    jobs = [(name, sys.executable, "engine", options) for name, options in wanted.ours.items()]
    jobs += [
        (name, interpreters[tool], tool, options)
        for name, (tool, options) in wanted.peers.items()
        if interpreters[tool]
    ]
    runs: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for turn in range(arguments.repeats):
        for name, interpreter, tool, options in jobs:
            if name in failed or (arguments.only and name not in arguments.only):
                continue
            sys.stderr.write(f"{turn + 1}/{arguments.repeats} {name}\n")
            found = _run(arguments, inputs, interpreter, tool, options)
            if isinstance(found, str):
                failed[name] = found
            else:
                runs.setdefault(name, []).append(found)
    return {"variants": {name: _summary(arguments, inputs, found) for name, found in runs.items()}, "failed": failed}


def _run(
    arguments: argparse.Namespace, inputs: bench_inputs.Inputs, interpreter: str, tool: str, options: dict[str, Any]
) -> dict[str, Any] | str:
    """What was seen, or the last line of the error."""
    with tempfile.TemporaryDirectory() as folder:
        job = inputs.job | {"options": options, "folder": folder, "threads": arguments.threads}
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [interpreter, str(Path(__file__).parent / "bench_worker.py"), tool, json.dumps(job)],
            env=environment | {"CUDA_VISIBLE_DEVICES": "", "TRL_EXPERIMENTAL_SILENCE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        sys.stderr.write(f"{tool} {options} failed:\n{done.stderr[-3000:]}\n")
        errors = [line for line in done.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
        return (errors or [f"exit status {done.returncode}"])[-1]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _summary(arguments: argparse.Namespace, inputs: bench_inputs.Inputs, runs: list[dict[str, Any]]) -> dict[str, Any]:
    best = min(runs, key=lambda run: sum(run["step_seconds"][arguments.warmup :]))
    counted = range(arguments.warmup, len(best["step_seconds"]))
    seconds = sum(best["step_seconds"][step] for step in counted)
    pairs = arguments.micro_batch_size * len(counted)
    return {
        "pairs_per_second": pairs / seconds,
        # every token of a pair once: its prompt is not counted twice
        "tokens_per_second": inputs.mean_tokens * pairs / seconds,
        "useful_flops_per_second": inputs.mean_flops * pairs / seconds,
        "peak_memory_bytes": statistics.median(run["peak_memory_bytes"] for run in runs),
        "loss_first_step": best["losses"][0],
        "loss_last_step": best["losses"][-1],
        "seconds_of_each_run": [sum(run["step_seconds"][arguments.warmup :]) for run in runs],
        "version": best["version"],
    }


def _add_ratios(result: dict[str, Any]) -> None:
    rate = result["machine"]["matmul_flops_per_second"]
    peers = [name for name in SETS[result["set"]].peers if name in result["variants"]]
    base = result["variants"][next(iter([*peers, *result["variants"]]))]
    for variant in result["variants"].values():
        variant["fraction_of_matmul_rate"] = variant["useful_flops_per_second"] / rate
        variant["speed_ratio"] = variant["pairs_per_second"] / base["pairs_per_second"]
        variant["memory_ratio"] = variant["peak_memory_bytes"] / base["peak_memory_bytes"]


HEADER = ("variant", "pairs/s", "tokens/s", "speed", "peak memory", "memory", "of matmul rate", "first loss")


def _table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; without the arithmetic rate where weights are frozen, which need fewer operations."""
    left_out = "of matmul rate" if SETS[result["set"]].frozen_weights else None
    kept = [index for index, title in enumerate(HEADER) if title != left_out]
    rows = [[row[index] for index in kept] for row in _rows(result)]
    return [HEADER[index] for index in kept], rows


def _rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            f"{variant['pairs_per_second']:.2f}",
            f"{variant['tokens_per_second']:.0f}",
            f"{variant['speed_ratio']:.2f}",
            f"{variant['peak_memory_bytes'] / 2**20:.0f} MiB",
            f"{variant['memory_ratio']:.2f}",
            f"{variant['fraction_of_matmul_rate']:.0%}",
            f"{variant['loss_first_step']:.5f}",
        )
        for name, variant in result["variants"].items()
    ]


def _print(result: dict[str, Any]) -> None:
    header, rows = _table(result)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _markdown(result: dict[str, Any]) -> str:
    """The table, with what it was measured on."""
    machine, inputs = result["machine"], result["inputs"]
    peers = SETS[result["set"]].peers
    others = {peers[name][0]: row["version"] for name, row in result["variants"].items() if name in peers}
    taken_with = ", ".join(f"{name} {found}" for name, found in (result["versions"] | others).items())
    note = (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, fp32 products at "
        f"{machine['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s, load average {machine['load_average_at_start']} at "
        f"the start; {taken_with}. A model of {inputs['parameters'] / 1e6:.1f} million parameters, {inputs['pairs']} "
        f"pairs, {inputs['micro_batch_size']} a step, prompts of {inputs['mean_prompt_tokens']:.0f} and responses of "
        f"{inputs['mean_response_tokens']:.0f} tokens on average."
    )
    header, rows = _table(result)
    lines = [" | ".join(row) for row in (header, ["---"] * len(header), *rows)]
    failed = [f"- {name} did not run: `{why}`" for name, why in result["failed"].items()]
    return "\n".join([note, "", *(f"| {line} |" for line in lines), *(["", *failed] if failed else [])]) + "\n"


if __name__ == "__main__":
    main()
