"""The pair schedules and the fused head against their baselines, in one process: bytes, seconds, gradient differences.

    python -m scripts.measure_memory                  # measure, print, write docs/benchmarks/memory.json
    python -m scripts.measure_memory --write-docs     # and put the tables into docs/memory.md

Repetitions of the compared variants take turns, and every ratio is of medians of the same run. Wall time is reported
with the CPU time of the process, which depends less on other programs on the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import Qwen2Config

from mindspeed_simpo.batch import TokenizedPair
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.data.collate import collate_padded
from mindspeed_simpo.device import Device, open_device
from scripts.engine import build_engine
from scripts.machine import processor, versions
from scripts.marked import write_marked
from scripts.memory_tables import tables
from scripts.tensor_bytes import PeakBytes, StoredBytes

DOCS = Path(__file__).parent.parent / "docs"
SCHEDULES = ("concat", "split", "two_pass")
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both comparisons, with what they ran on."""
    device = open_device(arguments.device)
    from mindspeed_simpo.config.layout import Layout
    from mindspeed_simpo.parallel import initialize

    groups = initialize(Layout(), device)
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(1)
    load = os.getloadavg()[0]
    result = {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": arguments.device if device.is_cpu else torch.cuda.get_device_name(),
            "load_average_at_start": round(load, 1),
        },
        "versions": versions(),
        "schedules": [
            _schedules(arguments, device, groups, pairs, recompute)
            for recompute in ({}, FULL_RECOMPUTE)
            for pairs in arguments.pairs
        ],
        "heads": [_heads(arguments, device, groups, hidden) for hidden in arguments.head_hidden],
    }
    result["machine"]["load_average_at_end"] = round(os.getloadavg()[0], 1)
    return result


def _schedules(
    arguments: argparse.Namespace, device: Device, groups: Any, pairs: int, recompute: dict[str, Any]
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        Qwen2Config(
            hidden_size=arguments.hidden,
            intermediate_size=4 * arguments.hidden,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.hidden // 64,
            num_key_value_heads=arguments.hidden // 64,
            vocab_size=arguments.vocab,
            tie_word_embeddings=True,
            architectures=["Qwen2ForCausalLM"],
        ).save_pretrained(folder)
        engines = {
            name: build_engine(
                Config(
                    model_name_or_path=folder,
                    init_from="config",
                    data_path="unused",
                    bf16=False,  # as on a CPU, so that figures of devices compare
                    batching="padded",
                    pair_schedule=name,
                    micro_batch_size=pairs,
                    global_batch_size=pairs,
                    **recompute,
                ),
                device,
                groups,
            )
            for name in SCHEDULES
        }
    batches = _batches(arguments, pairs)
    num_pairs = pairs * len(batches)

    def step(name: str) -> None:
        models, schedule = engines[name]
        for model in models:
            model.zero_grad_buffer()
        schedule.forward_backward(batches, num_pairs)

    stored, grads = {}, {}
    for name, (models, _) in engines.items():
        with StoredBytes(models[0].parameters()) as counter:
            step(name)
        stored[name] = counter.peak
        grads[name] = torch.cat([parameter.main_grad.flatten() for parameter in models[0].parameters()]).clone()
    seconds = _take_turns({name: (lambda name=name: step(name)) for name in SCHEDULES}, device, arguments.repeats)
    allocated = {name: _allocated(device, lambda name=name: step(name)) for name in SCHEDULES}
    shape = {key: getattr(arguments, key) for key in ("hidden", "layers", "vocab", "prompt", "response")}
    return {
        "shape": shape
        | {"pairs": pairs, "micro_batches": len(batches), "recompute": bool(recompute), "dtype": "float32"},
        "variants": {
            name: {
                "stored_bytes": stored[name],
                "stored_ratio": stored[name] / stored["concat"],
                **seconds[name],
                "wall_ratio": seconds[name]["wall_seconds"] / seconds["concat"]["wall_seconds"],
                "cpu_ratio": seconds[name]["cpu_seconds"] / seconds["concat"]["cpu_seconds"],
                "gradient_difference": float((grads[name] - grads["concat"]).norm() / grads["concat"].norm()),
                **allocated[name],
            }
            for name in SCHEDULES
        },
    }


def _batches(arguments: argparse.Namespace, pairs: int) -> list[Any]:
    """Two micro-batches; chosen and rejected are equally long, so that no schedule gains from padding."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(arguments.vocab, (count,), generator=generator).tolist()

    def pair() -> TokenizedPair:
        return TokenizedPair(ids(arguments.prompt), ids(arguments.response), ids(arguments.response), source="random")

    return [collate_padded([pair() for _ in range(pairs)], list(range(pairs))) for _ in range(2)]


def _heads(arguments: argparse.Namespace, device: Device, groups: Any, hidden_size: int) -> dict[str, Any]:
    from mindspeed_simpo.loss.head import ResponseHead

    generator = torch.Generator().manual_seed(0)
    tokens, vocab = arguments.head_tokens, arguments.head_vocab
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(device.torch_device).requires_grad_()
    weight = torch.randn(vocab, hidden_size, generator=generator).mul_(hidden_size**-0.5).to(device.torch_device)
    weight = torch.nn.Parameter(weight)
    targets = torch.randint(vocab, (tokens,), generator=generator).to(device.torch_device)
    upstream = torch.randn(tokens, generator=generator).to(device.torch_device)
    # the gradient's place is there before and after, as megatron's DDP holds it
    weight.main_grad = torch.zeros_like(weight)
    weight.grad_added_to_main_grad = False
    whole = ResponseHead(
        groups.tensor, groups.context, vocab_size=vocab, sum_dtype=torch.float64, weight_grad_awaited=False
    )
    heads = {"unfused": whole, "fused": dataclasses.replace(whole, chunk_tokens=arguments.chunk_tokens)}

    def run(name: str) -> list[torch.Tensor]:
        hidden.grad = weight.grad = None
        weight.main_grad.zero_()
        logprobs = heads[name].token_logprobs(hidden, weight, targets)
        logprobs.backward(upstream)
        if weight.grad is not None:
            weight.main_grad.add_(weight.grad)
            weight.grad = None
        return [logprobs.detach(), hidden.grad, weight.main_grad]

    made, results = {}, {}
    for name in heads:
        with PeakBytes([hidden, weight, weight.main_grad]) as counter:
            outputs = run(name)
        made[name] = counter.peak
        results[name] = [tensor.clone() for tensor in outputs]
        del outputs
    differences = [
        float((one - other).norm() / one.norm())
        for one, other in zip(results["unfused"], results["fused"], strict=True)
    ]
    del results
    seconds = _take_turns({name: (lambda name=name: run(name)) for name in heads}, device, arguments.head_repeats)
    base = seconds["unfused"]
    return {
        "shape": {
            "hidden": hidden_size,
            "vocab": vocab,
            "tokens": tokens,
            "chunk_tokens": arguments.chunk_tokens,
            "dtype": "float32",
        },
        "variants": {
            name: {
                "peak_extra_bytes": made[name],
                "peak_extra_ratio": made[name] / made["unfused"],
                **seconds[name],
                "wall_ratio": seconds[name]["wall_seconds"] / base["wall_seconds"],
                "cpu_ratio": seconds[name]["cpu_seconds"] / base["cpu_seconds"],
                **_allocated(device, lambda name=name: run(name)),
            }
            for name in heads
        },
        "differences": dict(zip(("logprobs", "hidden_gradient", "weight_gradient"), differences, strict=True)),
    }


def _take_turns(variants: dict[str, Callable[[], Any]], device: Device, repeats: int) -> dict[str, dict[str, Any]]:
    """Medians of wall and CPU seconds; one warm-up of each, then all of them in turn ``repeats`` times."""
    wall: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            device.synchronize()
            begin, begin_cpu = time.perf_counter(), time.process_time()
            run()
            device.synchronize()
            if turn:
                wall[name].append(time.perf_counter() - begin)
                cpu[name].append(time.process_time() - begin_cpu)
    return {
        name: {
            "wall_seconds": statistics.median(wall[name]),
            "wall_seconds_range": [min(wall[name]), max(wall[name])],
            "cpu_seconds": statistics.median(cpu[name]),
        }
        for name in variants
    }


def _allocated(device: Device, run: Callable[[], Any]) -> dict[str, int]:
    """On an accelerator, what the allocator held at the peak above what it held before."""
    if device.is_cpu:
        return {}
    accelerator = getattr(torch, device.name)
    before = accelerator.memory_allocated()
    accelerator.reset_peak_memory_stats()
    run()
    return {"allocated_bytes": accelerator.max_memory_allocated() - before}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda", "npu"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=5)
    for name, default in (
        ("hidden", 320), ("layers", 4), ("vocab", 4096), ("prompt", 128), ("response", 256),
        ("head-vocab", 152_000), ("head-tokens", 4096), ("chunk-tokens", 512), ("head-repeats", 3),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 2], help="pairs of a micro-batch")
    parser.add_argument("--head-hidden", type=int, nargs="+", default=[256])
    parser.add_argument("--output", type=Path, default=DOCS / "benchmarks" / "memory.json")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/memory.md")
    return parser.parse_args()


def main() -> None:
    """Measure, print and write."""
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = tables(result)
    Console().print(text, markup=False, soft_wrap=True)
    if arguments.write_docs:
        write_marked(DOCS / "memory.md", "measured", text)


if __name__ == "__main__":
    main()
