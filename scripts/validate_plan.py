"""How well ``plan`` predicts: steps of small models on this host's ranks, measured, beside what a simulation says.

    python -m scripts.validate_plan                        # docs/benchmarks/plan.json and plan.md
    python -m scripts.validate_plan --ranks 1 2 --steps 5  # on a host of two cores
    python -m scripts.validate_plan --limit 1 --output /tmp/plan.json   # one layout of each, to try the script

The rates are those of single operators (``mindspeed_simpo.studies.plan.calibration``), measured first; no measured step
enters a prediction. Both models train on random tokens of the same drawn lengths. Run it on a quiet host with a core
for each rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.resolution import resolve
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.studies.plan.calibration import measure_cpu
from mindspeed_simpo.studies.plan.devices import DeviceKind
from mindspeed_simpo.studies.plan.run_lengths import RunLengths, assumed_lengths
from mindspeed_simpo.studies.plan.report import describe
from mindspeed_simpo.studies.plan.simulation import Candidate, Simulator
from scripts.machine import processor, versions
from tests.hf import Pairs, make_checkpoint
from tests.ranks.launcher import run_ranks

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"
SEQ, PAIRS, VOCABULARY = 512, 16, 2000
RUN: dict[str, Any] = {"seq_length": SEQ, "global_batch_size": PAIRS, "device": "cpu", "train_iters": 4}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "intermediate": 1024, "vocab_size": VOCABULARY},
    "qwen3_moe": {"hidden": 192, "layers": 4, "heads": 4, "kv_heads": 2, "intermediate": 256, "vocab_size": VOCABULARY},
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PADDED = {"batching": "padded", "micro_batch_size": 2}
PACKED = {"batching": "packed", "max_tokens_per_micro_batch": 1024}
SHARED = {"batching": "prefix_shared", "max_tokens_per_micro_batch": 1024}
FORMS: tuple[dict[str, Any], ...] = (
    PADDED,
    {**PADDED, "micro_batch_size": 1},
    PACKED,
    {**PACKED, "max_tokens_per_micro_batch": 2048},
    {**PACKED, "pair_schedule": "two_pass"},
    SHARED,
    {**SHARED, **FULL},
    {**SHARED, "recompute_granularity": "selective"},
)
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
DEGREES: dict[int, tuple[dict[str, Any], ...]] = {
    1: ({},),
    2: (
        {TP: 2},
        {TP: 2, "sequence_parallel": True},
        {PP: 2},
        {PP: 2, "num_layers_per_virtual_pipeline_stage": 1},
        {"context_parallel_size": 2},
        {"use_distributed_optimizer": True},
        {"use_distributed_optimizer": True, "expert_model_parallel_size": 2},
    ),
    4: (
        {TP: 2, PP: 2, "sequence_parallel": True},
        {TP: 2, "sequence_parallel": True, "use_distributed_optimizer": True},
        {PP: 2, "use_distributed_optimizer": True},
    ),
}
GOALS = {"rank_correlation": 0.9, "median_error": 0.2, "memory_error": 0.15}


def _measured(folder: str, values: dict[str, Any], lengths: list[list[int]], steps: int) -> dict[str, float]:
    """Runs on each rank: median seconds of whole steps, and counted bytes of this rank."""
    import torch
    import torch.distributed as dist

    from mindspeed_simpo.batch import TokenizedPair
    from mindspeed_simpo.data.batching import Batching
    from mindspeed_simpo.data.loader import PairLoader
    from mindspeed_simpo.device import open_device
    from mindspeed_simpo.parallel import initialize
    from mindspeed_simpo.training.optimizer import build_stepper
    from scripts.engine import build_engine
    from scripts.tensor_bytes import PeakBytes, StoredBytes

    torch.set_num_threads(1)
    device = open_device("cpu")
    from megatron.core import tensor_parallel

    config = resolve(Config(**values), read_description(folder), "cpu")
    layout = make_layout(config, dist.get_world_size())
    groups = initialize(layout, device)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    models, schedule = build_engine(config, device, groups)
    stepper = build_stepper(models, config, config, device, 100)
    drawn = np.random.default_rng(1)
    pairs = Pairs(
        TokenizedPair(*(drawn.integers(VOCABULARY, size=size).tolist() for size in each), source="") for each in lengths
    )
    data_rank = dist.get_rank() // (layout.tensor * layout.context) % layout.data
    loader = PairLoader(
        pairs,
        seed=config.seed,
        global_batch_size=PAIRS,
        batching=Batching.of(config),
        data_parallel_rank=data_rank,
        data_parallel_size=layout.data,
    )

    def step(number: int) -> None:
        stepper.zero_grad()
        schedule.forward_backward(loader.train_step(number * PAIRS), PAIRS, number)
        stepper.update(stepper.squared_norm())

    step(0)
    found = []
    for number in range(steps):
        dist.barrier()
        begin = time.perf_counter()
        step(number % RUN["train_iters"])
        dist.barrier()
        found.append(time.perf_counter() - begin)
    parameters = [parameter for model in models for parameter in model.parameters()]
    gradients = [parameter.main_grad for parameter in parameters if parameter.requires_grad]
    lasting = sum(each.numel() * each.element_size() for each in (*parameters, *gradients))
    made = 0
    for number in range(RUN["train_iters"]):  # the largest pass is in one of the steps
        with StoredBytes(parameters) as stored, PeakBytes([*parameters, *gradients]) as peak:
            schedule.forward_backward(loader.train_step(number * PAIRS), PAIRS, number)
        made = max(made, stored.peak, peak.peak)
    return {"seconds": statistics.median(found), "bytes": lasting + made, "pipeline_rank": groups.pipeline.rank()}


def _cases(ranks: list[int], limit: int | None) -> list[tuple[int, dict[str, Any]]]:
    found = []
    for number in ranks:
        cases = [(number, {**degrees, **form}) for degrees in DEGREES[number] for form in FORMS]
        found += cases[:limit]
    return found


def validate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, measure and predict."""
    load = os.getloadavg()[0]
    kind = measure_cpu()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for family, shape in MODELS.items():
            checkpoint = make_checkpoint(Path(folder) / family, family, **shape)
            rows += _rows_of(family, str(checkpoint), kind, arguments)
    return {
        "machine": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "load_average_at_start": round(load, 1),
            "load_average_at_end": round(os.getloadavg()[0], 1),
        },
        "versions": versions(),
        "device_kind": kind.model_dump(),
        "rows": rows,
        "summary": summary(rows),
        "goals": GOALS,
    }


def _rows_of(family: str, folder: str, kind: DeviceKind, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    model = read_description(folder)
    windows = tuple({layer.attention.window for layer in model.first_of_kind})
    lengths = assumed_lengths(120, 100, 90, SEQ, RUN["train_iters"] * PAIRS)
    simulator = Simulator(model, kind, RunLengths(lengths, windows, "drawn"))
    rows = []
    for ranks, case in _cases(arguments.ranks, arguments.limit):
        values = {"model_name_or_path": folder, "data_path": "unused", "init_from": "config", **RUN, **case}
        config = resolve(Config(**values), model, "cpu")
        try:
            candidate = Candidate(config, make_layout(config, ranks, model, "cpu"))
        except ConfigError:
            continue  # such as experts of a model that has none
        found = run_ranks(_measured, ranks, folder, values, lengths.tolist(), arguments.steps)
        memory = {each.pipeline_rank: each for each in simulator.memory(candidate, whole_run=True)}
        errors = [
            (each.total - each.optimizer) / one["bytes"] - 1
            for one in found
            for each in [memory[int(one["pipeline_rank"])]]
        ]
        simulated, measured = simulator.step(candidate), max(each["seconds"] for each in found)
        row = {
            "model": family,
            "ranks": ranks,
            "layout": describe(candidate),
            "measured_seconds": measured,
            "predicted_seconds": simulated.total,
            "error": simulated.total / measured - 1,
            "memory_error": max(errors, key=abs),
            "parts_seconds": simulated.parts,
        }
        rows.append(row)
        print(f"{family}, {row['layout']}: {measured:.3f} s, predicted {simulated.total:.3f} s")  # noqa: T201
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Rank correlation of Spearman, median and largest error of seconds and memory."""
    measured, predicted = (np.array([row[f"{name}_seconds"] for row in rows]) for name in ("measured", "predicted"))
    places = [np.argsort(np.argsort(each)) for each in (measured, predicted)]
    return {
        "layouts": len(rows),
        "rank_correlation": float(np.corrcoef(*places)[0, 1]) if len(rows) > 1 else 1.0,
        "median_error": float(np.median(np.abs(predicted / measured - 1))),
        "largest_error": float(np.max(np.abs(predicted / measured - 1))),
        "median_memory_error": float(np.median([abs(row["memory_error"]) for row in rows])),
        "memory_error": float(max(abs(row["memory_error"]) for row in rows)),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown of the result."""
    total, machine = result["summary"], result["machine"]
    built = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "# How well `plan` predicts",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {built}; "
        f"load average {machine['load_average_at_start']} at the start, {machine['load_average_at_end']} at the end. "
        "Written by `python -m scripts.validate_plan`.",
        "",
        f"{total['layouts']} layouts: rank correlation {total['rank_correlation']:.3f}, median error of the seconds "
        f"{total['median_error']:.1%}, largest {total['largest_error']:.1%}; memory without the optimizer's state "
        f"off by {total['median_memory_error']:.1%} in the median, {total['memory_error']:.1%} at most.",
        "",
        "| model | ranks | layout | measured, s | predicted, s | error | memory off by |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['ranks']} | {row['layout']} | {row['measured_seconds']:.3f} | "
        f"{row['predicted_seconds']:.3f} | {row['error']:+.0%} | {row['memory_error']:+.0%} |"
        for row in result["rows"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], choices=[*DEGREES])
    parser.add_argument("--steps", type=int, default=7, help="measured steps of a layout")
    parser.add_argument("--limit", type=int, help="largest number of layouts of each number of ranks")
    parser.add_argument("--output", type=Path, default=DOCS / "plan.json")
    arguments = parser.parse_args()
    result = validate(arguments)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    arguments.output.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(json.dumps(result["summary"], indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
