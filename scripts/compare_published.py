"""What ``plan`` simulates for setups whose speed others have published: the table of docs/planning.md.

    python -m scripts.compare_published                # the table
    python -m scripts.compare_published --write-docs

The published programs are others than this one: the difference is that of program, device and simulation together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.resolution import resolve
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.studies.plan.devices import KINDS
from mindspeed_simpo.studies.plan.run_lengths import RunLengths, assumed_lengths
from mindspeed_simpo.studies.plan.simulation import Candidate, Simulator
from scripts.layouts import description_of
from scripts.marked import write_marked

DOCS = Path(__file__).parent.parent / "docs" / "planning.md"
TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
PADDED = {"batching": "padded", "micro_batch_size": 1, "sequence_parallel": True, "use_distributed_optimizer": True}
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class WithReference(Config):
    """A run whose reference model computes a forward of all pairs in each step."""

    @property
    def reference_is_base(self) -> bool:
        """That forward is simulated as that of the model without its adapters is."""
        return True


@dataclass(frozen=True)
class Setup:
    """A published figure, and what is simulated for it."""

    source: str
    setup: str
    model: str
    device: str
    devices: int
    pairs: int
    """Of a step."""
    published: float
    """Seconds of a step."""
    lengths: tuple[int, int, int]
    """Mean tokens of prompt and responses."""
    assumed: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    reference: bool = True
    drawn: bool = True
    """Whether lengths vary; else all are equal."""
    bound: bool = False
    """Whether the figure is an upper bound."""


_NEMO: dict[str, Any] = {
    **{
        "source": "NeMo-RL, recipe and CI bound",
        "model": "Llama-3.1-8B",
        "device": "H100",
        "devices": 32,
        "pairs": 256,
    },
    **{"bound": True},
}
_NEMO_ASSUMED = "lengths: {} tokens; the reference's forward in the step; nothing overlaps"
_MINDSPEED: dict[str, Any] = {
    **{"source": "MindSpeed-RL, docs/algorithms/dpo.md", "model": "Qwen3-30B-A3B", "devices": 16, "pairs": 64},
    **{"lengths": (220, 220, 220), "keys": {**PADDED, TENSOR: 2, PIPELINE: 8, "seq_length": 4096}},
    "assumed": "lengths: 220 + 220 + 220 tokens, by the size of the data set; every expert in two shards",
}
SETUPS = (
    Setup(
        **_NEMO,
        setup="DPO Llama-3.1-8B, 32 x H100, TP4 SP DP8, single pairs up to 8,192 tokens",
        published=11.5,
        lengths=(700, 450, 450),
        assumed=_NEMO_ASSUMED.format("700 + 450 + 450"),
        keys={**PADDED, TENSOR: 4, "seq_length": 8192},
    ),
    Setup(
        **_NEMO,
        setup="the same, TP2 SP PP2 DP8, up to 2,048 tokens",
        published=6.7,
        lengths=(600, 400, 400),
        assumed=_NEMO_ASSUMED.format("600 + 400 + 400"),
        keys={**PADDED, TENSOR: 2, PIPELINE: 2, "seq_length": 2048},
    ),
    Setup(
        **_MINDSPEED,
        setup="DPO Qwen3-30B-A3B, 16 NPUs of Atlas A2, TP2 SP PP8, single pairs",
        device="910B-64GB",
        published=64 / 2.78,
    ),
    Setup(**_MINDSPEED, setup="the same on 16 dies of Atlas A3", device="A3", published=64 / 7.19),
    Setup(
        source="NeMo AutoModel, SFT with LoRA",
        setup="Llama-3-8B, one H100, 4,096 tokens: 12,473 tokens/s",
        model="Llama-3.1-8B",
        device="H100",
        devices=1,
        pairs=1,
        published=8192 / 12473,
        lengths=(1, 4095, 4095),
        assumed="two sequences of 4,096 tokens at once, all scored; rank 8 on all projections; nothing recomputed",
        keys={
            "batching": "padded",
            "micro_batch_size": 1,
            "seq_length": 4096,
            "lora_r": 8,
            "lora_target_modules": _ALL,
        },
        reference=False,
        drawn=False,
    ),
)

TOO_LITTLE = {
    "ms-swift, DPO of Qwen3-30B-A3B": "the device is not named, and the optimizer's state is on the host",
    "open-instruct, DPO of OLMo2-7B and Olmo-3-7B": "FSDP, and for one ZeRO-3, which `plan` does not simulate",
    "MindSpeed-LLM, DPO of Qwen3-8B cut to one layer": "lengths, recomputation and the device's variant are not named",
    "TRL, loss head on one H100": "its bare matrix products are what the efficiency of the H100 is from",
}
"""Published figures that say too little, and what is missing."""


def simulated_seconds(setup: Setup) -> float:
    """Seconds of a step."""
    model = description_of(setup.model)
    kind = KINDS[setup.device]
    given = {"model_name_or_path": "-", "data_path": "-", "global_batch_size": setup.pairs, "bf16": True}
    of_run = WithReference if setup.reference else Config
    config = resolve(of_run(**given, **setup.keys, device=kind.device), model, kind.device)
    number = max(1024, setup.pairs)
    lengths = np.tile(setup.lengths, (number, 1))
    if setup.drawn:
        lengths = assumed_lengths(*setup.lengths, config.seq_length, number)
    windows = tuple(dict.fromkeys(layer.attention.window for layer in model.first_of_kind))
    candidate = Candidate(config, make_layout(config, setup.devices, model, kind.device))
    return Simulator(model, kind, RunLengths(lengths, windows, "assumed")).step(candidate).total


def table() -> str:
    """Markdown: a row for each setup, and the names of those that say too little."""
    header = ["source", "setup", "published, s a step", "simulated, s a step", "simulated / published", "assumed"]
    rows = [header, ["---"] * len(header)]
    for setup in SETUPS:
        seconds = simulated_seconds(setup)
        published = f"{'at most ' if setup.bound else ''}{setup.published:.3g}"
        rows.append(
            [setup.source, setup.setup, published, f"{seconds:.3g}", f"{seconds / setup.published:.2f}", setup.assumed]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", "Not compared:", "", *(f"- {name}: {why}." for name, why in TOO_LITTLE.items())])


def main() -> None:
    """Print the table, or write it into the docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-docs", action="store_true", help=f"into {DOCS.name}")
    if parser.parse_args().write_docs:
        write_marked(DOCS, "published", table())
    else:
        sys.stdout.write(table() + "\n")


if __name__ == "__main__":
    main()
