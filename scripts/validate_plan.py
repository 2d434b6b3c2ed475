"""How well ``plan`` predicts: steps of small models on this host's ranks, measured, beside what a simulation says.

    python -m scripts.validate_plan                            # docs/benchmarks/plan.json and plan.md
    python -m scripts.validate_plan --ranks 1 2 4 --every 1   # all layouts, on a host of four cores
    python -m scripts.validate_plan --every 9 --output /tmp/plan.json   # every ninth layout, to try the script
    python -m scripts.validate_plan --again    # nothing is measured: the table of another simulation

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
from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.studies.plan.calibration import measure_cpu
from mindspeed_simpo.studies.plan.devices import DeviceKind
from scripts.machine import processor, versions
from scripts.marked import write_marked
from scripts.plan_cases import DEGREES, MODELS, PAIRS, RUN, VOCABULARY, Predictor, cases
from tests.hf import Pairs
from tests.ranks.launcher import run_ranks

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"
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


def validate(ranks: list[int], steps: int, every: int) -> dict[str, Any]:
    """Calibrate, measure and predict.

    Args:
        ranks: Numbers of processes.
        steps: Measured steps of a layout.
        every: 1 measures all layouts, N every N-th one.
    """
    load = os.getloadavg()[0]
    kind = measure_cpu()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for family in MODELS:
            predictor = Predictor(family, Path(folder), kind)
            for number, keys in cases(ranks, every):
                candidate = predictor.candidate(number, keys)
                if candidate is None:
                    continue
                lengths = predictor.lengths.tolist()
                found = run_ranks(_measured, number, predictor.folder, predictor.values(keys), lengths, steps)
                row = {"model": family, "ranks": number, "keys": keys, "of_ranks": found}
                rows.append(row | predictor.prediction(candidate, found))
                print(_line(rows[-1]))  # noqa: T201
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


def predict_again(result: dict[str, Any]) -> dict[str, Any]:
    """The same measurements and rates, with the predictions that the simulation makes now."""
    kind, rows = DeviceKind(**result["device_kind"]), []
    with tempfile.TemporaryDirectory() as folder:
        predictors = {family: Predictor(family, Path(folder), kind) for family in MODELS}
        for row in result["rows"]:
            predictor = predictors[row["model"]]
            candidate = predictor.candidate(row["ranks"], row["keys"])
            assert candidate is not None, "a layout that was measured is allowed"
            rows.append(row | predictor.prediction(candidate, row["of_ranks"]))
    return result | {"rows": rows, "summary": summary(rows)}


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['model']}, {row['layout']}: {row['measured_seconds']:.3f} s, predicted {row['predicted_seconds']:.3f} s"
    )


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


def sentence(total: dict[str, float]) -> str:
    """The summary in words."""
    return (
        f"{total['layouts']} layouts: rank correlation {total['rank_correlation']:.3f}, median error of the seconds "
        f"{total['median_error']:.1%}, largest {total['largest_error']:.1%}; memory without the optimizer's state "
        f"off by {total['median_memory_error']:.1%} in the median, {total['memory_error']:.1%} at most."
    )


def table(result: dict[str, Any]) -> str:
    """Markdown of the result."""
    machine = result["machine"]
    built = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "# How well `plan` predicts",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {built}; "
        f"load average {machine['load_average_at_start']} at the start, {machine['load_average_at_end']} at the end. "
        "Written by `python -m scripts.validate_plan`.",
        "",
        sentence(result["summary"]),
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
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a layout")
    parser.add_argument("--every", type=int, default=3, help="1 measures all layouts, N every N-th one")
    parser.add_argument("--again", action="store_true", help="predict what the output file has measured, again")
    parser.add_argument("--output", type=Path, default=DOCS / "plan.json")
    arguments = parser.parse_args()
    if arguments.again:
        result = predict_again(json.loads(arguments.output.read_text(encoding="utf-8")))
    else:
        result = validate(arguments.ranks, arguments.steps, arguments.every)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    arguments.output.with_suffix(".md").write_text(table(result), encoding="utf-8")
    if arguments.output == DOCS / "plan.json":
        write_marked(DOCS.parent / "planning.md", "accuracy", sentence(result["summary"]))
    print(json.dumps(result["summary"], indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
