"""Which layout trains which model on how many NPUs, by the memory that ``check`` expects: the table of docs/layouts.md.

    python -m scripts.layouts                # the table
    python -m scripts.layouts --write-docs   # into docs/layouts.md

For each model, kind of training, number of NPUs and memory of an NPU, the first layout that fits, in this order:
without recomputation before with full recomputation, experts over the NPUs of one host before several hosts, fewer
ranks for one copy of the model before more, and of equal ones fewer tensor-parallel ranks. All pairs have the same
lengths, half of the longest sequence prompt and half response. What is not estimated, such as fragmentation, has 10 %
of the memory.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.largest import LargestPass, largest_pass
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.training.memory import estimate_memory
from scripts.marked import write_marked

DOCS = Path(__file__).parent.parent / "docs" / "layouts.md"
USABLE = 0.9
PAIRS = 128
_GIB = 2**30

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 131072}
_QWEN = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "head_dim": 128, "vocab_size": 151936}
_QWEN = {**_QWEN, "max_position_embeddings": 40960}


def _shape(base: dict[str, Any], layers: int, hidden: int, inner: int, heads: int, groups: int, **more: Any) -> str:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return json.dumps({**base, **dict(zip(names, (layers, hidden, inner, heads, groups), strict=True)), **more})


_EXPERTS = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
MODELS = {
    "Llama-3.1-8B": _shape(_LLAMA, 32, 4096, 14336, 32, 8, vocab_size=128256),
    "Qwen3-8B": _shape({"model_type": "qwen3", **_QWEN}, 36, 4096, 12288, 32, 8),
    "Qwen3-32B": _shape({"model_type": "qwen3", **_QWEN}, 64, 5120, 25600, 64, 8),
    "Llama-3.1-70B": _shape(_LLAMA, 80, 8192, 28672, 64, 8, vocab_size=128256),
    "Qwen3-30B-A3B": _shape(
        {"model_type": "qwen3_moe", **_QWEN, **_EXPERTS},
        *(48, 2048, 6144, 32, 4),
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    "Mixtral-8x7B": _shape(
        {**_LLAMA, "model_type": "mixtral", "rope_theta": 1e6, "vocab_size": 32000},
        *(32, 4096, 14336, 32, 8),
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "gpt-oss-20b": _shape(
        {"model_type": "gpt_oss", "rms_norm_eps": 1e-5, "rope_theta": 150000, "max_position_embeddings": 131072},
        *(24, 2880, 2880, 64, 8),
        head_dim=64,
        vocab_size=201088,
        num_local_experts=32,
        num_experts_per_tok=4,
        sliding_window=128,
        rope_scaling={"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    ),
}
"""The published config.json of each model, as far as its memory depends on it."""

TRAINING: dict[str, dict[str, Any]] = {
    "all weights": {},
    "LoRA": {"lora_r": 16, "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@dataclass(frozen=True)
class Choice:
    """A layout that fits."""

    layout: Layout
    recompute: str
    memory: float
    """GiB of the pipeline rank that needs most."""

    def __str__(self) -> str:
        recompute = "" if self.recompute == "none" else ", recompute"
        return f"{self.layout}{recompute}: {self.memory:.0f}"


@functools.cache
def description_of(model: str) -> ModelDescription:
    """The description of one of :data:`MODELS`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(MODELS[model], encoding="utf-8")
        return read_description(folder)


def _candidates(ranks: int, experts: int) -> Iterator[dict[str, Any]]:
    """Layouts in the order of preference; experts are divided over the NPUs of one host before those of several."""
    degrees = (1, 2, 4, 8)
    spans = sorted({int(np.gcd(experts, span)) for span in (8, 16, 32, 64) if span <= ranks}) if experts else [1]
    found = [
        (recompute, expert, tensor, pipeline)
        for recompute, expert, tensor, pipeline in itertools.product(RECOMPUTE, spans, degrees, degrees)
        if tensor * pipeline <= ranks and ranks // pipeline % expert == 0
    ]
    order = list(RECOMPUTE)
    for recompute, expert, tensor, pipeline in sorted(
        found, key=lambda each: (order.index(each[0]), each[1], each[2] * each[3], each[2])
    ):
        yield {
            "recompute": recompute,
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
            "sequence_parallel": tensor > 1,
            **({"expert_model_parallel_size": expert, "expert_tensor_parallel_size": 1} if experts else {}),
        }


@functools.cache
def _largest(seq_length: int, data: int, form: str) -> LargestPass:
    lengths = np.tile([seq_length // 2, seq_length // 2, seq_length // 2], (PAIRS, 1))
    config = Config(
        model_name_or_path="-", data_path="-", seq_length=seq_length, global_batch_size=PAIRS, batching=form
    )
    return largest_pass(lengths, config, Batching.of(config), Layout(data=data, pipeline=8))


def choose(model: str, training: str, ranks: int, gib: int, seq_length: int) -> Choice | None:
    """The first layout that fits; None where none does."""
    description = description_of(model)
    experts = max((layer.experts.number for layer in description.layers if layer.experts is not None), default=0)
    for candidate in _candidates(ranks, experts):
        recompute = candidate.pop("recompute")
        config = Config(
            model_name_or_path=model,
            data_path="-",
            seq_length=seq_length,
            global_batch_size=PAIRS,
            bf16=True,
            device="npu",
            use_distributed_optimizer=True,
            **candidate,
            **TRAINING[training],
            **RECOMPUTE[recompute],
        )
        try:
            layout = make_layout(config, ranks, description, "npu")
        except ConfigError:
            continue
        largest = _largest(seq_length, layout.data, config.batching_in_use)
        estimates = estimate_memory(description, config, layout, largest, "npu")
        memory = max(estimate.total for estimate in estimates) / _GIB
        if memory <= USABLE * gib:
            return Choice(layout, recompute, memory)
    return None


def table(seq_length: int) -> str:
    """Markdown: a row for each model, kind of training and memory of an NPU, a column for each number of NPUs."""
    counts = (8, 16, 64)
    lines = [
        f"| model | trained | GiB of an NPU | {' | '.join(f'{count} NPUs' for count in counts)} |",
        "|---" * (3 + len(counts)) + "|",
    ]
    for model, training, gib in itertools.product(MODELS, TRAINING, (64, 32)):
        found = [choose(model, training, count, gib, seq_length) for count in counts]
        cells = " | ".join("-" if choice is None else str(choice) for choice in found)
        lines.append(f"| {model} | {training} | {gib} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or write it into the docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--write-docs", action="store_true")
    arguments = parser.parse_args()
    rows = table(arguments.seq_length)
    if not arguments.write_docs:
        print(rows)  # noqa: T201
        return
    write_marked(DOCS, "layouts", rows)


if __name__ == "__main__":
    main()
