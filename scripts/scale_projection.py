"""What the measured costs give at the size of a cluster: the table at the end of docs/scaling.md.

    python -m scripts.scale_projection
    python -m scripts.scale_projection --write-docs

The constants are quotients of figures in the tables above it in docs/scaling.md, which the scripts named there print;
memory and messages of a step are computed from the shapes of Llama-3-70B.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.largest import largest_pass
from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.training.memory import estimate_memory
from scripts.communication import step_traffic
from scripts.layouts import description_of
from scripts.marked import write_marked

DOCS = Path(__file__).parent.parent / "docs" / "scaling.md"
PARAMETERS = 70_553_706_496
RUN: dict[str, Any] = {
    "model_name_or_path": "unused",
    "data_path": "unused",
    "bf16": True,
    "seq_length": 4096,
    "micro_batch_size": 1,
    "global_batch_size": 512,
    "tensor_model_parallel_size": 8,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 8,
    "use_distributed_optimizer": True,
}
RANKS, RANKS_OF_HOST, MODEL_RANKS = 512, 8, 64
PAIRS, TOKENS, BYTES = 100_000_000, 1000, 4000
USED_PAIRS = 1000 * RUN["global_batch_size"]
"""Of 1,000 steps."""

# the figures of the tables in docs/scaling.md, seconds and bytes
GROUPS = 1.11 / 16
AGREEMENT = 0.1144 / 16
SHA256 = 0.3 / (180 * 2**20)
BLAKE2B = 0.68 / (408 * 2**20)
SHORT_PAIR, SHORT_TOKENS = 488.6 / 1_000_000, 79
LONG_PAIR, LONG_TOKENS = 65.0 / 20_000, 1409
TOKEN = (LONG_PAIR - SHORT_PAIR) / (LONG_TOKENS - SHORT_TOKENS)
PAIR = SHORT_PAIR - SHORT_TOKENS * TOKEN
MERGE = 1.2 / (110 * 2**20)
REPORT = 0.5 / 1_000_000
COPY, SAVE, READ = (seconds / (408 * 2**20) for seconds in (0.37, 2.24, 0.19))
PAIR_BYTES = 3 * 4 + 8 + 8
"""Three lengths, the place in the cache file and the place in the order of the epoch."""

Row = tuple[str, str, str]
"""Name, formula and value of a cost."""


def costs() -> list[Row]:
    """All rows of the table."""
    cached, shard, weights = 4 * TOKENS * PAIRS, 12 * PARAMETERS / RANKS, 2 * PARAMETERS
    own_shard = "12 P / W"
    return [
        _timed("process groups", GROUPS, "W", RANKS),
        _timed("one agreement of all ranks", AGREEMENT, "W", RANKS),
        _timed("digest of the data, each host reads them once", SHA256, "N D / 8", PAIRS * BYTES / RANKS_OF_HOST),
        (
            "tokenising, one process a rank",
            f"({_constant(PAIR)} + {_constant(TOKEN)} x T) x N / W",
            _time((PAIR + TOKEN * TOKENS) * PAIRS / RANKS),
        ),
        _timed("merging the shards, one rank", MERGE, "4 N T", cached),
        _timed("warm start: verification, one rank of each host", SHA256, "4 N T", cached),
        _timed("warm start: report, each rank", REPORT, "N", PAIRS),
        ("lengths and order of the pairs, each rank", f"{PAIR_BYTES} bytes x N", _size(PAIR_BYTES * PAIRS)),
        ("weights read, each rank", "2 P / (TP PP)", _size(weights / MODEL_RANKS)),
        _timed("digest of weights (DPO), each rank", BLAKE2B, "2 P / W", weights / RANKS),
        ("reference pass of 1,000 steps (DPO)", "used pairs x T", f"{USED_PAIRS * TOKENS:,} tokens forward"),
        ("checkpoint: file of each rank", own_shard, _size(shard)),
        _timed("checkpoint: copy to host memory, training waits", COPY, own_shard, shard),
        _timed("checkpoint: writing and digest, in the background", SAVE, own_shard, shard),
        _timed("resume: verification, each rank its share", BLAKE2B, own_shard, shard),
        _timed("resume: reading, each rank", READ, own_shard, shard),
        *_memory(),
        *_messages(),
    ]


def _timed(name: str, constant: float, quantity: str, amount: float) -> Row:
    return name, f"{_constant(constant)} x {quantity}", _time(constant * amount)


def _constant(seconds: float) -> str:
    unit, name = next(
        (unit, name) for unit, name in ((1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"), (1e-12, "ps")) if seconds >= unit
    )
    return f"{seconds / unit:.2g} {name}" if seconds < 100 * unit else f"{seconds / unit:.0f} {name}"


@functools.cache
def _planned() -> tuple[ModelDescription, Config, Layout]:
    """The model, its configuration and its layout."""
    config = Config(**RUN)
    model = description_of("Llama-3.1-70B")
    return model, config, make_layout(config, RANKS, model, "npu")


def _memory() -> list[Row]:
    model, config, layout = _planned()
    half = config.seq_length // 2
    lengths = np.full((config.global_batch_size, 3), half)
    longest = largest_pass(lengths, config, Batching.of(config), layout)
    estimates = estimate_memory(model, config, layout, longest, "npu")
    largest = max(estimates, key=lambda estimate: estimate.total)
    return [
        (
            f"device memory, pipeline rank {largest.pipeline_rank}, 2,048 tokens a prompt and a response",
            "`check`",
            _size(largest.total),
        )
    ]


def _messages() -> list[Row]:
    model, config, layout = _planned()
    sent = step_traffic(model, config, layout)
    found = []
    for axis in ("tensor", "data", "pipeline"):
        size = sum(size for (_, of), size in sent.items() if of == axis)
        found.append((f"messages of a step on the {axis} axis, each rank", "`scripts/communication.py`", _size(size)))
    return found


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    head = ("cost", "formula", "70B, 512 ranks, 100 million pairs")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * 3, *rows))


def main() -> None:
    """Print the table, or write it into the documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-docs", action="store_true", help=f"into {DOCS.name}")
    found = table(costs())
    if not parser.parse_args().write_docs:
        sys.stdout.write(found + "\n")
        return
    write_marked(DOCS, "projection", found)


if __name__ == "__main__":
    main()
