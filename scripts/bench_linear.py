"""Time of a step against the tokens of its packed rows: equal pairs, more and more of them, in one micro-batch.

python -m scripts.bench_linear                  # print
python -m scripts.bench_linear --write          # and write docs/benchmarks/linear.json
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

import torch
from transformers import Qwen2Config

from mindspeed_simpo.batch import TokenizedPair
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.device import open_device
from scripts.engine import build_engine
from scripts.machine import processor, versions

DOCS = Path(__file__).parent.parent / "docs"
PAIR_TOKENS = 512
COUNTS = (2, 4, 8, 16, 32)


def main() -> None:
    """Measure a factor of 16 in tokens; times are medians, and the sizes take turns."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_linear", description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/linear.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = _steps()
    seconds: dict[int, list[float]] = {tokens: [] for tokens in steps}
    for turn in range(arguments.repeats + 1):
        for tokens, step in steps.items():
            begin = time.perf_counter()
            step()
            if turn:
                seconds[tokens].append(time.perf_counter() - begin)
    medians = {tokens: statistics.median(found) for tokens, found in seconds.items()}
    smallest = min(medians)
    result = {
        "machine": {"processor": processor(), "threads": arguments.threads, "load_average": os.getloadavg()[0]},
        "versions": versions(),
        "seconds_by_tokens": medians,
        "seconds_a_token_relative_to_the_smallest": {
            tokens: found / tokens / (medians[smallest] / smallest) for tokens, found in medians.items()
        },
    }
    text = json.dumps(result, indent=1)
    print(text)  # noqa: T201
    if arguments.write:
        (DOCS / "benchmarks" / "linear.json").write_text(text + "\n", encoding="utf-8")


def _steps() -> dict[int, Any]:
    device = open_device("cpu")
    from megatron.core import tensor_parallel

    from mindspeed_simpo.parallel import initialize

    groups = initialize(Layout(), device)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    with tempfile.TemporaryDirectory() as folder:
        Qwen2Config(
            hidden_size=320,
            intermediate_size=864,
            num_hidden_layers=4,
            num_attention_heads=5,
            num_key_value_heads=5,
            vocab_size=16384,
            tie_word_embeddings=True,
            architectures=["Qwen2ForCausalLM"],
        ).save_pretrained(folder)
        config = Config(
            model_name_or_path=folder,
            init_from="config",
            data_path="unused",
            batching="prefix_shared",
            max_tokens_per_micro_batch=PAIR_TOKENS * max(COUNTS),
        )
        wrapped, schedule = build_engine(config, device, groups)
    quarter = PAIR_TOKENS // 4
    pair = TokenizedPair([5] * (2 * quarter), [6] * quarter, [7] * quarter, "")
    batching = Batching.of(config)

    def step_of(count: int) -> Any:
        batches = batching.micro_batches([pair] * count, list(range(count)))
        assert len(batches) == 1

        def step() -> None:
            wrapped[0].zero_grad_buffer()
            schedule.forward_backward(batches, count)

        return step

    return {PAIR_TOKENS * count: step_of(count) for count in COUNTS}


if __name__ == "__main__":
    main()
