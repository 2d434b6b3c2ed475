"""Weak and strong scaling of four models from 8 to 4,096 NPUs, simulated: the curves of docs/scaling.md.

    python -m scripts.plan_curves                # the tables
    python -m scripts.plan_curves --write-docs   # docs/benchmarks/scaling.json, .md and .svg, and into docs/scaling.md

Strong scaling keeps the pairs of a step, weak scaling keeps them for each NPU. Every number is simulated.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.studies.plan.devices import KINDS, DeviceKind
from mindspeed_simpo.studies.plan.layouts import RECOMPUTE, Space
from mindspeed_simpo.studies.plan.rank import USABLE, search
from mindspeed_simpo.studies.plan.reasons import name_of
from mindspeed_simpo.studies.plan.report import describe
from mindspeed_simpo.studies.plan.run_lengths import RunLengths, assumed_lengths
from mindspeed_simpo.studies.plan.simulation import Candidate, Simulator, StepTime
from scripts.curve_tables import efficiencies, findings, full_tables, picture
from scripts.layouts import description_of
from scripts.marked import write_marked

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
RESULTS = PAGE.parent / "benchmarks" / "scaling.json"
DEVICES = tuple(2**power for power in range(3, 13))
LENGTHS, SEQ = (512, 384, 384), 4096
STRONG, WEAK = (128, 1024), 4
"""Pairs of a step: in strong scaling of all NPUs, in weak scaling of each."""
TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
_FULL = RECOMPUTE[-1]
SCRIPTS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {TENSOR: 2, PIPELINE: 4},
    "Qwen3-32B": {TENSOR: 8, PIPELINE: 2, **_FULL},
    "Llama-3.1-70B": {TENSOR: 8, PIPELINE: 8},
    "Qwen3-30B-A3B": {
        **{TENSOR: 2, PIPELINE: 2, "expert_model_parallel_size": 8, "expert_tensor_parallel_size": 1},
        **_FULL,
    },
}
"""Layouts of ``scripts/ascend/engine_simpo_*``; of 70B, which has no script, that of docs/scaling.md's last table."""


@functools.cache
def _run(pairs: int, windows: tuple[int | None, ...]) -> RunLengths:
    return RunLengths(assumed_lengths(*LENGTHS, SEQ, max(4096, pairs)), windows, "assumed")


def point(name: str, kind: DeviceKind, devices: int, pairs: int) -> dict[str, Any]:
    """The fastest layout of a model on a number of devices, and how far others are from it."""
    model = description_of(name)
    config = Config(
        model_name_or_path="-", data_path="-", seq_length=SEQ, global_batch_size=pairs, device=kind.device, bf16=True
    )
    windows = tuple(dict.fromkeys(layer.attention.window for layer in model.first_of_kind))
    simulator = Simulator(model, kind, _run(pairs, windows))
    space = Space(config, model, devices, kind.device)
    plan = search(space, simulator, keep=1)
    found: dict[str, Any] = {"model": name, "devices": devices, "pairs": pairs}
    if not plan.ranked:
        missing = [each.refused.memory_bytes for each in plan.refused if each.refused is not None]
        needed = {"needed_gib": min(missing) / 2**30} if missing else {}
        return {**found, **needed}
    best = plan.winner
    script = space.candidate({**SCRIPTS[name], "sequence_parallel": True, "use_distributed_optimizer": True})
    usual = space.changed(best.candidate, {"max_tokens_per_micro_batch": None})
    return {
        **found,
        "layout": describe(best.candidate),
        "keys": _keys(best.candidate),
        "seconds": best.time.total,
        "rate": best.time.pairs_per_second / devices,
        "parts": _shares(best.time, best.candidate, kind),
        "script": _factor(simulator, script, best.time),
        "default_budget": _factor(simulator, usual, best.time) if best.candidate.config.batching != "padded" else None,
    }


def _keys(candidate: Candidate) -> dict[str, Any]:
    config, layout = candidate.config, candidate.layout
    return {
        "tensor": layout.tensor,
        "context": layout.context,
        "pipeline": layout.pipeline,
        "data": layout.data,
        "expert": layout.expert,
        "sequence_parallel": layout.sequence_parallel,
        "virtual": layout.virtual_pipeline,
        "batching": config.batching,
        "budget": config.token_budget,
        "recompute": config.recompute_granularity,
        "pair_schedule": config.pair_schedule,
    }


def _shares(time: StepTime, candidate: Candidate, kind: DeviceKind) -> dict[str, float]:
    """Shares of the step by part in words, largest first."""
    parts = sorted(time.parts.items(), key=lambda item: -item[1])
    return {name_of(part, candidate.layout, kind): value / time.total for part, value in parts if value > 0}


def _factor(simulator: Simulator, candidate: Candidate | None, best: StepTime) -> float | str:
    """Seconds over those of the fastest."""
    if candidate is None:
        return "not allowed"
    needed = max(each.total for each in simulator.memory(candidate, whole_run=True))
    if needed > USABLE * simulator.kind.memory_bytes:
        return "does not fit"
    return simulator.step(candidate).total / best.total


def points(kind: DeviceKind) -> Iterator[dict[str, Any]]:
    """All points, with the kind of scaling: the pairs of a step, or ``weak``."""
    for scaling in (*STRONG, "weak"):
        for name in SCRIPTS:
            for devices in DEVICES:
                pairs = WEAK * devices if isinstance(scaling, str) else scaling
                yield {"scaling": str(scaling), **point(name, kind, devices, pairs)}


def main() -> None:
    """Print the tables, or write them into the docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device-kind", choices=[*KINDS], default="910B-64GB")
    parser.add_argument("--write-docs", action="store_true")
    arguments = parser.parse_args()
    found = list(points(KINDS[arguments.device_kind]))
    text = f"{efficiencies(found)}\n\n{findings(found)}"
    if not arguments.write_docs:
        sys.stdout.write(f"{text}\n\n{full_tables(found)}\n")
        return
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(full_tables(found) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".svg").write_text(picture(found), encoding="utf-8")
    write_marked(PAGE, "plan", text)


if __name__ == "__main__":
    main()
