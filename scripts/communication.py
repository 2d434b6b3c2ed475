"""Bytes that one optimizer step sends, by axis: formulas, and their sum for a model and a layout at stated link speeds.

tests/ranks/test_communication.py compares the formulas with the bytes that the engine sends.

    python scripts/communication.py              # the table of docs/parallelism.md
    python scripts/communication.py --write-docs
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scripts.marked import write_marked

FP32 = 4
DOCS = Path(__file__).parent.parent / "docs" / "parallelism.md"


@dataclass(frozen=True)
class Shape:
    """Model and batch: what a micro-batch of ``rows`` sequences of ``seq`` tokens needs."""

    layers: int
    hidden: int
    kv_heads: int
    head_dim: int
    parameters: int
    seq: int
    rows: int
    response_tokens: int
    """Scored tokens of the micro-batch's rows together."""
    micro_batches: int
    bytes_per_number: int = 2


@dataclass(frozen=True)
class Axes:
    """Degrees."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False

    @property
    def ranks(self) -> int:
        """Their product."""
        return self.tensor * self.context * self.pipeline * self.data


def micro_batch_traffic(shape: Shape, axes: Axes, layers: int, *, first: bool, last: bool) -> Counter[tuple[str, str]]:
    """Bytes of one micro-batch, forward and backward, of a stage with ``layers`` layers.

    By ``(collective, axis)``; what counts is the whole tensor: the input of an all-reduce, the output of a gather, the
    input of a reduce-scatter. Without recomputation.
    """
    sent: Counter[tuple[str, str]] = Counter()
    local = shape.rows * shape.seq // axes.context
    activations = local * shape.hidden * shape.bytes_per_number
    if axes.tensor > 1 and axes.sequence_parallel:
        # column- and row-parallel layers, twice a layer; the backward gathers the layer's input once more
        sent["gather", "tensor"] += layers * 6 * activations + first * activations + last * activations
        sent["scatter", "tensor"] += layers * 4 * activations + first * activations + last * activations
    elif axes.tensor > 1:
        sent["reduce", "tensor"] += layers * 4 * activations + first * activations
        tokens = shape.response_tokens // axes.context
        sent["reduce", "tensor"] += last * tokens * shape.hidden * shape.bytes_per_number
    if axes.tensor > 1 and last:
        sent["reduce", "tensor"] += 3 * FP32 * shape.response_tokens // axes.context
    if axes.context > 1:
        keys = shape.rows * shape.seq * shape.kv_heads // axes.tensor * shape.head_dim * shape.bytes_per_number
        sent["gather", "context"] += layers * 2 * keys
        sent["scatter", "context"] += layers * 2 * keys
        sent["reduce", "context"] += last * shape.rows * 2 * FP32
    if axes.pipeline > 1:
        part = activations // axes.tensor if axes.sequence_parallel else activations
        sent["send", "pipeline"] += part * ((not last) + (not first))
    return sent


def norm_gradients(shape: Shape, axes: Axes, layers: int, *, last: bool) -> int:
    """Bytes of the norms' gradients, which sequence-parallel ranks add up once a step (fp32)."""
    return (2 * layers + last) * shape.hidden * FP32 if axes.tensor > 1 and axes.sequence_parallel else 0


def step_traffic(shape: Shape, axes: Axes) -> Counter[tuple[str, str]]:
    """Bytes of one optimizer step of the busiest rank: a middle stage, with the gradients' reduction."""
    layers = -(-shape.layers // axes.pipeline)
    alone = axes.pipeline == 1
    one = micro_batch_traffic(shape, axes, layers, first=alone, last=alone)
    sent: Counter[tuple[str, str]] = Counter({key: value * shape.micro_batches for key, value in one.items()})
    sent["reduce", "tensor"] += norm_gradients(shape, axes, layers, last=alone)
    own = shape.parameters // (axes.tensor * axes.pipeline)
    if axes.data * axes.context > 1 and axes.distributed_optimizer:
        sent["scatter", "data"] += own * FP32
        sent["gather", "data"] += own * shape.bytes_per_number
    elif axes.data * axes.context > 1:
        sent["reduce", "data"] += own * FP32
    return sent


def seconds(
    sent: Counter[tuple[str, str]], axes: Axes, inside: float, outside: float, per_node: int
) -> dict[str, float]:
    """Time of each axis if nothing overlaps: ring algorithms at the bandwidth of the slowest link that they cross.

    Args:
        sent: Of :func:`step_traffic`.
        axes: Ranks are numbered tensor first, then context, data and pipeline, as megatron-core does.
        inside: Bytes a second between NPUs of a node, one way.
        outside: Bytes a second of an NPU to other nodes, one way.
        per_node: NPUs of a node.
    """
    sizes = {
        "tensor": axes.tensor,
        "context": axes.context,
        "data": axes.data * axes.context,
        "pipeline": axes.pipeline,
    }
    reach = {
        "tensor": axes.tensor,
        "context": axes.tensor * axes.context,
        "data": axes.tensor * axes.context * axes.data,
        "pipeline": axes.ranks,
    }
    times: dict[str, float] = dict.fromkeys(sizes, 0.0)
    for (collective, axis), size in sent.items():
        ranks = sizes[axis]
        factor = {"reduce": 2 * (ranks - 1) / ranks, "send": 1.0}.get(collective, (ranks - 1) / ranks)
        times[axis] += factor * size / (inside if reach[axis] <= per_node else outside)
    return times


LLAMA_8B = {"layers": 32, "hidden": 4096, "kv_heads": 8, "head_dim": 128, "parameters": 8_030_000_000}
CASES = [
    (8, Axes(tensor=8, sequence_parallel=True)),
    (8, Axes(tensor=4, data=2, sequence_parallel=True, distributed_optimizer=True)),
    (64, Axes(tensor=8, data=8, sequence_parallel=True, distributed_optimizer=True)),
    (64, Axes(tensor=4, context=2, data=8, sequence_parallel=True, distributed_optimizer=True)),
    (512, Axes(tensor=8, data=64, sequence_parallel=True, distributed_optimizer=True)),
    (512, Axes(tensor=8, pipeline=4, data=16, sequence_parallel=True, distributed_optimizer=True)),
]


def rows_of_table(inside: float, outside: float, per_node: int) -> list[list[str]]:
    """Llama-3-8B's shape, 8,192 tokens a sequence, one pair a micro-batch, 512 pairs a step."""
    rows = []
    for ranks, axes in CASES:
        assert axes.ranks == ranks
        shape = Shape(**LLAMA_8B, seq=8192, rows=2, response_tokens=4096, micro_batches=512 // axes.data)
        sent = step_traffic(shape, axes)
        times = seconds(sent, axes, inside, outside, per_node)
        by_axis = Counter(dict.fromkeys(times, 0))
        for (_, axis), size in sent.items():
            by_axis[axis] += size
        layout = f"TP{axes.tensor} CP{axes.context} PP{axes.pipeline} DP{axes.data}"
        cells = [f"{by_axis[axis] / 1e9:,.1f} GB, {times[axis]:,.2f} s" for axis in times]
        rows.append([str(ranks), layout, str(shape.micro_batches), *cells])
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
    rows = rows_of_table(options.inside_gb_per_s * 1e9, options.outside_gb_per_s * 1e9, options.npus_per_node)
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
