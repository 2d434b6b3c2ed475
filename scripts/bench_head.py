"""The output layer with SimPO's loss, alone: this package's heads, a plain one, and Liger's, on the same tensors.

Every variant is a separate process. The report has the seconds of a forward and backward (median), the growth of
resident memory above that of the inputs, and the loss and gradients, which must agree.

    python -m scripts.bench_head                            # ours and the plain one
    python -m scripts.bench_head --liger-python PATH        # and Liger's, which that interpreter can import
    python -m scripts.bench_head --name head                # and write docs/benchmarks/head.{json,md}
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).parent.parent / "docs"
BETA, MARGIN, IGNORED = 2.5, 1.375, -100
VARIANTS = ("fused", "whole logits of response tokens", "whole logits", "Liger")
AGREEMENT = 1e-5


def head_of(name: str, shape: dict[str, int]) -> Any:
    """``(hidden [row, seq, hidden], weight, targets [row, seq]) -> loss``; imports only what the variant needs."""
    if name == "Liger":
        from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

        module = LigerFusedLinearSimPOLoss(beta=BETA, gamma=MARGIN, alpha=0.0, compute_nll_loss=False, compiled=False)
        return lambda hidden, weight, targets: module(weight, hidden, targets)[0]
    if name == "whole logits":

        def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            scored = targets != IGNORED
            logprobs = (hidden @ weight.t()).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            chosen, rejected = ((logprobs * scored).sum(1) / scored.sum(1)).chunk(2)
            return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected) - MARGIN).mean()

        return plain
    return _our_head(fused=name == "fused", shape=shape)


def _our_head(*, fused: bool, shape: dict[str, int]) -> Any:
    from mindspeed_simpo.batch import ScoredTokens
    from mindspeed_simpo.config.config import Config
    from mindspeed_simpo.config.layout import Layout
    from mindspeed_simpo.device import open_device
    from mindspeed_simpo.loss.head import ResponseHead
    from mindspeed_simpo.loss.pair_loss import PairLoss
    from mindspeed_simpo.losses import LossInputs
    from mindspeed_simpo.parallel import initialize

    groups = initialize(Layout(), open_device("cpu"))
    config = Config(model_name_or_path="none", data_path="none", simpo_beta=BETA, gamma_beta_ratio=MARGIN / BETA)
    objective = PairLoss.of(config)
    head = ResponseHead(
        groups.tensor,
        groups.context,
        vocab_size=shape["vocab"],
        sum_dtype=torch.float64,
        chunk_tokens=shape["chunk_tokens"] if fused else None,
        weight_grad_awaited=False,
    )

    def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        sums = head(hidden.transpose(0, 1), weight, ScoredTokens.of(targets))
        counts = (targets != IGNORED).sum(1).chunk(2)
        return objective(LossInputs(*sums.chunk(2), *counts)).loss.mean()

    return ours


def work(name: str, shape: dict[str, int]) -> None:
    """One variant; prints JSON."""
    torch.set_num_threads(shape["threads"])
    head = head_of(name, shape)
    generator = torch.Generator().manual_seed(0)
    rows, seq = 2 * shape["pairs"], shape["prompt"] + shape["response"]
    hidden = torch.randn(rows, seq, shape["hidden"], generator=generator).requires_grad_()
    weight = (
        torch.randn(shape["vocab"], shape["hidden"], generator=generator) / shape["hidden"] ** 0.5
    ).requires_grad_()
    targets = torch.randint(shape["vocab"], (rows, seq), generator=generator)
    targets[:, : shape["prompt"]] = IGNORED
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(shape["repeats"] + 1):
        hidden.grad = weight.grad = None
        begin = time.perf_counter()
        loss = head(hidden, weight, targets)
        loss.backward()
        seconds.append(time.perf_counter() - begin)
    assert hidden.grad is not None
    assert weight.grad is not None
    found = {
        "seconds": statistics.median(seconds[1:]),
        "peak_growth_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        "loss": float(loss.detach()),
        "hidden_gradient_norm": float(hidden.grad.norm()),
        "weight_gradient_norm": float(weight.grad.norm()),
        "version": version("liger-kernel") if name == "Liger" else version("torch"),
    }
    sys.stdout.write(json.dumps(found) + "\n")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All variants, and whether they agree."""
    shape = {key: getattr(arguments, key) for key in _SHAPE}
    interpreters = dict.fromkeys(VARIANTS[:-1], sys.executable)
    if arguments.liger_python:
        interpreters["Liger"] = arguments.liger_python
    variants = {}
    for name, interpreter in interpreters.items():
        # imported by its name in this package, run by its path in another environment
        entry = ["-m", "scripts.bench_head"] if interpreter == sys.executable else [__file__]
        command = [interpreter, *entry, "--worker", name, json.dumps(shape)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        variants[name] = json.loads(done.stdout.splitlines()[-1])
    base = variants["whole logits"]
    for name, variant in variants.items():
        for key in ("loss", "hidden_gradient_norm", "weight_gradient_norm"):
            if abs(variant[key] - base[key]) > AGREEMENT * abs(base[key]):
                raise SystemExit(f"{name}: {key} {variant[key]} is not {base[key]}: not the same computation")
        variant["time_ratio"] = variant["seconds"] / base["seconds"]
        variant["memory_ratio"] = variant["peak_growth_bytes"] / base["peak_growth_bytes"]
    return {"shape": shape, "variants": variants}


_SHAPE = {
    "pairs": 4,
    "prompt": 256,
    "response": 256,
    "hidden": 512,
    "vocab": 32000,
    "chunk_tokens": 512,
    "threads": 2,
    "repeats": 3,
}


def markdown(result: dict[str, Any]) -> str:
    """The table, with what it was measured on."""
    shape, machine = result["shape"], result["machine"]
    note = (
        f"{machine['processor']}, {machine['cores']} cores, {shape['threads']} threads; "
        f"{', '.join(f'{name} {found}' for name, found in result['versions'].items())}; load average "
        f"{machine['load_average_at_start']} at the start. {shape['pairs']} pairs, prompts of {shape['prompt']} and "
        f"responses of {shape['response']} tokens, width {shape['hidden']}, vocabulary {shape['vocab']}, fp32."
    )
    header = "| head | s | time | growth of memory | memory | loss |\n|---|---|---|---|---|---|"
    rows = [
        f"| {name} | {row['seconds']:.2f} | {row['time_ratio']:.2f} | {row['peak_growth_bytes'] / 2**20:.0f} MiB | "
        f"{row['memory_ratio']:.2f} | {row['loss']:.6f} |"
        for name, row in result["variants"].items()
    ]
    return "\n".join([note, "", header, *rows]) + "\n"


def main() -> None:
    """Measure, print and write ``docs/benchmarks/NAME.json`` and ``NAME.md``."""
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2], json.loads(sys.argv[3]))
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_head", description=__doc__.split("\n\n")[0])
    for name, default in _SHAPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--liger-python", help="interpreter that can import liger_kernel")
    parser.add_argument("--name", help="write docs/benchmarks/NAME.json and NAME.md")
    arguments = parser.parse_args()
    from scripts.machine import processor, versions

    load = round(os.getloadavg()[0], 1)
    machine = {"processor": processor(), "cores": os.cpu_count(), "load_average_at_start": load}
    result = {"machine": machine, **measure(arguments)}
    result["versions"] = versions()
    if "Liger" in result["variants"]:
        result["versions"]["liger-kernel"] = result["variants"]["Liger"]["version"]
    text = markdown(result)
    sys.stdout.write(text)
    if arguments.name:
        path = DOCS / "benchmarks" / arguments.name
        path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(text, encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
