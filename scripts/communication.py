"""Bytes that one optimizer step sends, by axis, for a model and a layout at stated link speeds.

The messages are those of ``mindspeed_simpo.studies.plan.collectives``, which tests/ranks/test_plan.py compares with the
bytes that the engine sends.

    python -m scripts.communication              # the table of docs/parallelism.md
    python -m scripts.communication --write-docs
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.model.naming import pipeline_chunks
from mindspeed_simpo.studies.plan.collectives import Axis, Traffic, group_of, seconds, step_messages
from mindspeed_simpo.studies.plan.devices import KINDS, Collective, DeviceKind, Link
from mindspeed_simpo.studies.plan.passes import Passes
from mindspeed_simpo.studies.plan.simulation import trained_parameters
from scripts.layouts import description_of
from scripts.marked import write_marked

DOCS = Path(__file__).parent.parent / "docs" / "parallelism.md"


def step_traffic(model: ModelDescription, config: Config, layout: Layout) -> Counter[tuple[Collective, Axis]]:
    """Bytes of one optimizer step of a dense model's busiest rank, a middle stage, by ``(collective, axis)``.

    What counts is the whole tensor: the input of an all-reduce, the output of a gather, the input of a reduce-scatter.
    Each micro-batch is one padded pair of two sequences of ``seq_length`` tokens, half of them response.

    Args:
        model: The description.
        config: Switches, sequence length and global batch.
        layout: Degrees.
    """
    seq, alone = config.seq_length, layout.pipeline == 1
    tokens, rows = np.array([2.0 * seq]), np.array([2.0])
    passes = Passes(tokens, rows, tokens / 2, rows, rows / 2, rows / 2, 0 * rows, {})
    traffic = Traffic(model, config, layout, passes)
    chunk = pipeline_chunks(model, layout.pipeline)[min(1, layout.pipeline - 1)]
    messages = [each for layer in chunk.layers(model) for each in traffic.forward(layer) + traffic.backward(layer)]
    for backward in (False, True):
        messages += traffic.ends(first=alone, last=alone, backward=backward)
    sent: Counter[tuple[Collective, Axis]] = Counter()
    for kind, axis, size, _ in messages:
        sent[kind, axis] += int(size.sum())
    if not alone:
        sent["send", "pipeline"] += 2 * int(traffic.between_stages().sum())
    micro_batches = config.global_batch_size // layout.data
    sent = Counter({key: value * micro_batches for key, value in sent.items()})
    norms = (2 * chunk.num_layers + alone) * model.hidden_size
    dense, of_experts = trained_parameters(model, config, layout, chunk.pipeline_rank)
    for kind, axis, size in step_messages(config, layout, dense, of_experts, norms):
        if axis == "tensor" or (axis == "data" and layout.data * layout.context > 1):
            sent[kind, axis] += int(size)
    return sent


def seconds_by_axis(sent: Counter[tuple[Collective, Axis]], layout: Layout, kind: DeviceKind) -> dict[str, float]:
    """Time of each axis if nothing overlaps.

    Args:
        sent: Of :func:`step_traffic`.
        layout: Degrees.
        kind: Links.
    """
    times: dict[str, float] = dict.fromkeys(("tensor", "context", "data", "pipeline"), 0.0)
    for (collective, axis), size in sent.items():
        times[axis] += float(seconds(collective, size, group_of(axis, layout, kind), kind))
    return times


RUN: dict[str, Any] = {
    **{"model_name_or_path": "-", "data_path": "-", "seq_length": 8192, "global_batch_size": 512, "bf16": True},
    **{"batching": "padded", "sequence_parallel": True, "use_distributed_optimizer": True},
}
TENSOR, CONTEXT, PIPELINE = "tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"
CASES: tuple[tuple[int, dict[str, Any]], ...] = (
    (8, {TENSOR: 8}),
    (8, {TENSOR: 4}),
    (64, {TENSOR: 8}),
    (64, {TENSOR: 4, CONTEXT: 2}),
    (512, {TENSOR: 8}),
    (512, {TENSOR: 8, PIPELINE: 4}),
)


def rows_of_table(kind: DeviceKind) -> list[list[str]]:
    """Llama-3-8B's shape, 8,192 tokens a sequence, one pair a micro-batch, 512 pairs a step."""
    model, rows = description_of("Llama-3.1-8B"), []
    for ranks, degrees in CASES:
        config = Config(**{**RUN, **degrees})
        layout = make_layout(config, ranks, model, "npu")
        sent = step_traffic(model, config, layout)
        times = seconds_by_axis(sent, layout, kind)
        by_axis = Counter(dict.fromkeys(times, 0))
        for (_, axis), size in sent.items():
            by_axis[axis] += size
        name = f"TP{layout.tensor} CP{layout.context} PP{layout.pipeline} DP{layout.data}"
        cells = [f"{by_axis[axis] / 1e9:,.1f} GB, {times[axis]:,.2f} s" for axis in times]
        rows.append([str(ranks), name, str(config.global_batch_size // layout.data), *cells])
    return rows


def main() -> None:
    """Print the table, or write it into the documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inside-gb-per-s", type=float, default=196.0, help="between NPUs of a node, one way")
    parser.add_argument("--outside-gb-per-s", type=float, default=25.0, help="from an NPU to other nodes, one way")
    parser.add_argument("--npus-per-node", type=int, default=8)
    parser.add_argument("--write-docs", action="store_true", help=f"into {DOCS.name}")
    options = parser.parse_args()
    header = ["NPUs", "layout", "micro-batches", "tensor", "context", "data", "pipeline"]
    inside, outside = (
        Link(latency_s=0, bytes_per_s=1e9 * each) for each in (options.inside_gb_per_s, options.outside_gb_per_s)
    )
    links = {"inside": inside, "outside": outside, "devices_per_host": options.npus_per_node}
    rows = rows_of_table(KINDS["910B-64GB"].model_copy(update=links))
    if options.write_docs:
        lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
        write_marked(DOCS, "communication", "\n".join(lines))
        return
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
