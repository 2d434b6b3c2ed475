"""Pairs and tokens a second, MFU and peak memory of the shapes of 1B and 8B models, for every lever."""

from __future__ import annotations

import bisect
import statistics
import traceback
from pathlib import Path
from typing import Any

from mindspeed_simpo.device import Device
from scripts.bench_inputs import useful_flops
from scripts.device_report.job import Job
from scripts.device_report.memory import compared
from scripts.device_report.rates import peak_flops
from scripts.device_report.workload import FULL, Model, Shape, Work, estimate, open_world, seconds_of

SHAPES = {
    "1B": Shape("llama", 2048, 8192, 16, 32, 8, 128_256, tied=True),
    "8B": Shape("qwen3", 4096, 12_288, 36, 32, 8, 151_936, tied=False),
}
"""Of Llama-3.2-1B and Qwen3-8B."""
SMALL = {
    "1B": Shape("llama", 64, 256, 2, 4, 2, 1024, tied=True),
    "8B": Shape("qwen3", 96, 288, 2, 4, 2, 1024, tied=False),
}
_PADDED = {"batching": "padded", "micro_batch_size": 2}
_BUDGET = {"max_tokens_per_micro_batch": 4096}
_PACKED, _SHARED = {"batching": "packed", **_BUDGET}, {"batching": "prefix_shared", **_BUDGET}
LEVERS: dict[str, dict[str, Any]] = {
    "padded, whole logits": {**_PADDED, "fused_logprob": False},
    "padded, fused head": _PADDED,
    "padded, fused head, two_pass": {**_PADDED, "pair_schedule": "two_pass"},
    "packed, fused head": _PACKED,
    "packed, fused head, two_pass": {**_PACKED, "pair_schedule": "two_pass"},
    "prefix_shared, fused head": _SHARED,
}
"""Of one model; ratios are to the first."""
REBUILT: dict[str, dict[str, Any]] = {
    "prefix_shared, fused head, full recompute": FULL,
    "prefix_shared, fused head, adapters": {"lora_r": 16},
}
"""Of models of their own, of the same number of layers."""
_SHARE = 0.8
"""Of the device's memory that a model may be expected to need with the most demanding lever."""


def run(job: Job) -> None:
    """A row for each lever of the shape that the section's options name."""
    device = job.open_device()
    groups = open_world(device)
    name = str(job.options["shape"])
    shape = (SMALL if job.small else SHAPES)[name]
    work = Work.drawn(shape.vocab, *((4, 24, 24, 128) if job.small else (16, 512, 384, 2048)))
    layers = _layers_that_fit(job, shape, device, work)
    if layers == 0:
        job.add(shape=name, crashed="not one layer of this shape fits the memory of the device")
        return
    folder = shape.write(job.folder / f"speed-{name}", layers)
    row = {"shape": name, "layers": layers, "layers_of_model": shape.layers, "pairs": len(work.pairs)}
    speed = Speed(job, device, shape.with_layers(layers), work, row)
    bf16 = not device.is_cpu
    model = Model(folder, device, groups, work, bf16=bf16)
    for lever, keys in LEVERS.items():
        speed.measure(lever, model, keys)
    del model
    for lever, keys in REBUILT.items():
        device.release_memory()
        if job.has_time_for(lever):
            rebuilt = Model(folder, device, groups, work, bf16=bf16, **keys)
            speed.measure(lever, rebuilt, _SHARED)
            del rebuilt


def _layers_that_fit(job: Job, shape: Shape, device: Device, work: Work) -> int:
    """As many layers of the model as ``check`` expects to fit, with the optimizer."""
    memory = device.memory_bytes()
    if memory is None:
        return shape.layers

    def needed(layers: int) -> int:
        folder = shape.write(job.folder / "fits", layers)
        values = {"model_name_or_path": str(folder), "init_from": "config", "data_path": "unused", "bf16": True}
        values |= {"global_batch_size": len(work.pairs)}
        configs = [_resolved({**values, **keys}, folder, device) for keys in LEVERS.values()]
        return max(estimate(folder, config, work, device).total for config in configs)

    # the bytes rise with the layers
    return bisect.bisect_right(range(1, shape.layers + 1), _SHARE * memory, key=needed)


def _resolved(values: dict[str, Any], folder: Path, device: Device) -> Any:
    from mindspeed_simpo.config.config import Config
    from mindspeed_simpo.config.resolution import resolve
    from mindspeed_simpo.model.hf_config import read_description

    return resolve(Config(**values), read_description(str(folder)), device.name)


class Speed:
    """Rows of one shape."""

    def __init__(self, job: Job, device: Device, shape: Any, work: Work, row: dict[str, Any]) -> None:
        self.job, self.device, self.work, self.row = job, device, work, row
        lengths = [tuple(map(int, each)) for each in work.pairs.lengths]
        self.useful = sum(useful_flops(shape, *each) for each in lengths)
        # a sequence alone has its prompt once
        self.of_sequences = sum(
            useful_flops(shape, prompt, chosen, 0) + useful_flops(shape, prompt, 0, rejected)
            for prompt, chosen, rejected in lengths
        )
        facts, rates = job.options["facts"], job.options["rates"]
        self.peak = peak_flops(facts["device"], facts["product"], facts["memory_bytes"])
        self.matmul = rates.get("matmul_flops_fp32" if device.is_cpu else "matmul_flops_bf16")
        self.base: float | None = None

    def measure(self, lever: str, model: Model, keys: dict[str, Any]) -> None:
        """Add the row of a lever, or one that says why there is none."""
        if not self.job.has_time_for(lever):
            return
        try:
            step = model.step(**keys)
            step()
            memory = compared(self.device, model, step, model.estimate(**keys))
            seconds = statistics.median(seconds_of(self.device, step, 2 if self.job.small else 3, warm_ups=0))
        except Exception:
            self.job.add(**self.row, lever=lever, crashed=traceback.format_exc()[-1500:])
            self.device.release_memory()
            return
        self.base = self.base or seconds
        shared = keys["batching"] == "prefix_shared"
        done = self.useful if shared else self.of_sequences
        self.job.add(
            **self.row,
            lever=lever,
            seconds=seconds,
            pairs_per_second=len(self.work.pairs) / seconds,
            tokens_per_second=self.work.tokens / seconds,
            times_base=self.base / seconds,
            model_flops=done,
            mfu=None if not self.peak else done / seconds / self.peak,
            mfu_of_matmul=None if not self.matmul else done / seconds / self.matmul,
            useful_mfu_of_matmul=None if not self.matmul else self.useful / seconds / self.matmul,
            **memory,
        )
