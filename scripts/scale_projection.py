"""What the measured costs give at the size of a cluster: the table at the end of docs/scaling.md.

    python -m scripts.scale_projection
    python -m scripts.scale_projection --write-docs

The constants are those of the tables above it in docs/scaling.md, which the scripts named there print; memory and
messages of a step are computed from the shapes of Llama-3-70B.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.largest import largest_pass
from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.training.memory import estimate_memory
from scripts.communication import Axes, Shape, step_traffic

DOCS = Path(__file__).parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- projection: begin -->", "<!-- projection: end -->"
LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
    "rms_norm_eps": 1e-5,
}
PARAMETERS = 70_553_706_496
RUN = {
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
RANKS, RANKS_OF_HOST = 512, 8
PAIRS, TOKENS_OF_PAIR, BYTES_OF_PAIR = 100_000_000, 1000, 4000
USED_PAIRS = 512 * 1000
"""Of 1,000 steps."""


@dataclass(frozen=True)
class Measured:
    """Constants of this machine, seconds and bytes; see the tables of docs/scaling.md."""

    agreement_per_rank: float
    groups_per_rank: float
    digest: float
    """A byte of data or of a cache file, SHA-256."""
    blake2b: float
    """A byte of a checkpoint or of weights."""
    tokenise_pair: float
    tokenise_token: float
    merge: float
    """A byte of the cache file."""
    report_pair: float
    memory_pair: float
    """Bytes of each rank."""
    copy: float
    """A byte of a rank's checkpoint file, to host memory."""
    save: float
    """The same, to disk and digested."""
    read: float


MEASURED = Measured(
    agreement_per_rank=0.114 / 16,
    groups_per_rank=1.11 / 16,
    digest=0.3 / (180 * 2**20),
    blake2b=0.68 / (408 * 2**20),
    tokenise_pair=325e-6,
    tokenise_token=2.08e-6,
    merge=1.2 / (110 * 2**20),
    report_pair=0.5e-6,
    memory_pair=28,
    copy=0.37 / (408 * 2**20),
    save=2.24 / (408 * 2**20),
    read=0.19 / (408 * 2**20),
)


def costs(measured: Measured) -> list[tuple[str, str, str]]:
    """Name, formula and value of each cost."""
    cache_bytes = 4 * TOKENS_OF_PAIR * PAIRS
    shard = 12 * PARAMETERS / RANKS
    weights = 2 * PARAMETERS
    tokenise = measured.tokenise_pair + measured.tokenise_token * TOKENS_OF_PAIR
    rows = [
        ("process groups", "70 ms x W", _time(measured.groups_per_rank * RANKS)),
        ("one agreement of all ranks", "7 ms x W", _time(measured.agreement_per_rank * RANKS)),
        (
            "digest of the data, each host reads them once",
            "1.6 ns x N D / 8",
            _time(measured.digest * PAIRS * BYTES_OF_PAIR / 8),
        ),
        ("tokenising, one process a rank", "N (325 us + 2.1 us x T) / W", _time(tokenise * PAIRS / RANKS)),
        ("merging the shards, one rank", "10 ns x 4 N T", _time(measured.merge * cache_bytes)),
        ("warm start: verification, one rank of each host", "1.6 ns x 4 N T", _time(measured.digest * cache_bytes)),
        ("warm start: report, each rank", "0.5 us x N", _time(measured.report_pair * PAIRS)),
        ("memory of the pairs' lengths and order, each rank", "28 bytes x N", _size(measured.memory_pair * PAIRS)),
        ("weights read, each rank", "2 P / (TP PP)", _size(weights / 64)),
        ("digest of weights (DPO), each rank", "1.6 ns x 2 P / W", _time(measured.blake2b * weights / RANKS)),
        ("reference pass of 1,000 steps (DPO)", "used pairs x T", f"{USED_PAIRS * TOKENS_OF_PAIR:,} tokens forward"),
        ("checkpoint, file of each rank", "12 P / W", _size(shard)),
        ("checkpoint: copy to host memory, training waits", "0.9 ns x 12 P / W", _time(measured.copy * shard)),
        ("checkpoint: writing and digest, in background", "5.2 ns x 12 P / W", _time(measured.save * shard)),
        ("resume: verification of all files, divided", "1.6 ns x 12 P / W", _time(measured.blake2b * shard)),
        ("resume: reading, each rank", "0.4 ns x 12 P / W", _time(measured.read * shard)),
    ]
    rows += _memory()
    rows += _messages()
    return rows


def _memory() -> list[tuple[str, str, str]]:
    config = Config(**RUN)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_70B), encoding="utf-8")
        model = read_description(folder)
    layout = make_layout(config, RANKS, model, "npu")
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


def _messages() -> list[tuple[str, str, str]]:
    axes = Axes(tensor=8, pipeline=8, data=8, sequence_parallel=True, distributed_optimizer=True)
    shape = Shape(
        layers=80,
        hidden=8192,
        kv_heads=8,
        head_dim=128,
        parameters=PARAMETERS,
        seq=4096,
        rows=2,
        response_tokens=4096,
        micro_batches=512 // axes.data,
    )
    sent = step_traffic(shape, axes)
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


def table(rows: Sequence[tuple[str, str, str]]) -> str:
    """The rows as Markdown."""
    head = ("cost", "formula", "70B, 512 ranks, 100 million pairs")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * 3, *rows))


def main() -> None:
    """Print the table, or write it into the documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-docs", action="store_true", help=f"into {DOCS.name}")
    found = table(costs(MEASURED))
    if not parser.parse_args().write_docs:
        sys.stdout.write(found + "\n")
        return
    text = DOCS.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCS.write_text(f"{before}{BEGIN}\n{found}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
