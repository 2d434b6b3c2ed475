"""Which kernels a training step runs, by time, and whether attention, norms and products are those that should run."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from typing import Any

from mindspeed_simpo.device import Device
from mindspeed_simpo.device.inspection import Profile, profile
from scripts.device_report.job import Job
from scripts.device_report.workload import FULL, Model, Shape, Work, open_world

SHOWN = 12
"""Kernels of a row."""
LEVERS: dict[str, dict[str, Any]] = {
    "padded, whole logits": {"batching": "padded", "fused_logprob": False},
    "packed": {"batching": "packed"},
    "prefix_shared": {"batching": "prefix_shared"},
    "packed, two_pass": {"batching": "packed", "pair_schedule": "two_pass"},
}
"""Of one model."""
MODELS: dict[str, tuple[bool, dict[str, Any]]] = {
    "": (False, {}),
    ", full recompute": (False, FULL),
    ", adapters": (False, {"lora_r": 8}),
    ", experts": (True, {}),
}
"""Whether a model has experts, and keys that it is built with. The first has all levers, the others shared prompts."""
SMALL = {
    "bfloat16": ("padded, whole logits", "prefix_shared"),
    "float32": ("padded, whole logits", "packed", "prefix_shared", "prefix_shared, experts"),
}
"""What is profiled with small shapes."""
_EXPERTS = (("num_experts", 8), ("num_experts_per_tok", 2), ("moe_intermediate_size", 256), ("norm_topk_prob", True))
_FUSED = {
    "cpu": ("_scaled_dot_product_flash_attention_for_cpu",),
    "cuda": ("flash_attention", "flash_attn", "efficient_attention", "cudnn_attention", "varlen", "flex_attention"),
    "npu": ("FlashAttentionScore",),
}
"""Parts of names: an operator or kernel with such a name computes attention without dense scores."""
_DENSE = {
    "cpu": ("_scaled_dot_product_attention_math",),
    "cuda": ("_scaled_dot_product_attention_math",),
    "npu": ("SoftmaxV2",),
}
"""Names of operators that compute, or would compute, dense scores."""


def shape_of(small: bool, *, experts: bool = False) -> Shape:
    """A model of two layers that is large enough for the kernels of real ones."""
    hidden, heads, vocab = (64, 4, 512) if small else (1024, 16, 32_000)
    family, extra = ("qwen3_moe", _EXPERTS) if experts else ("qwen3", ())
    return Shape(family, hidden, 4 * hidden, 2, heads, heads // 2, vocab, tied=False, extra=extra)


def models_and_levers(
    job: Job, device: Device, groups: Any, **keys: Any
) -> Iterator[tuple[Model, str, dict[str, Any]]]:
    """Each model, with the name and the keys of each of its levers, while there is time."""
    for kind, (experts, own) in MODELS.items():
        shape = shape_of(job.small, experts=experts)
        folder = shape.write(job.folder / f"steps-{experts}")
        work = Work.drawn(shape.vocab, *((2, 30, 30, 128) if job.small else (8, 200, 200, 1024)))
        levers = LEVERS if not kind else {"prefix_shared": LEVERS["prefix_shared"]}
        if not job.has_time_for(f"steps{kind}"):
            continue
        model = Model(folder, device, groups, work, micro_batch_size=2, **keys, **own)
        for name, lever in levers.items():
            if job.has_time_for(f"{name}{kind}"):
                yield model, f"{name}{kind}", lever


def run(job: Job) -> None:
    """A row for each lever and dtype."""
    device = job.open_device()
    groups, heard = open_world(device), Heard()
    with heard:
        for bf16 in (True, False):
            dtype = "bfloat16" if bf16 else "float32"
            for model, name, keys in models_and_levers(job, device, groups, bf16=bf16):
                # PyTorch parses a profile in most of a second
                if not job.small or name in SMALL[dtype]:
                    _row(job, device, model, name, dtype, keys)
    job.add(said=list(heard.lines))


class Heard(logging.Handler):
    """What the package logs meanwhile, such as its choice of kernels, each line once."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: dict[str, None] = {}
        self._logger = logging.getLogger("mindspeed_simpo")

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines[record.getMessage()] = None

    def __enter__(self) -> Heard:
        self._level = self._logger.level
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level)


def _row(job: Job, device: Device, model: Model, lever: str, dtype: str, keys: dict[str, Any]) -> None:
    try:
        step = model.step(**keys)
        step()
        found = profile(device, step)
    except Exception:
        job.add(lever=lever, dtype=dtype, crashed=traceback.format_exc()[-1500:])
        return
    total = sum(kernel.seconds for kernel in found.kernels)
    job.add(
        lever=lever,
        dtype=dtype,
        kernels=[
            {"name": kernel.name, "calls": kernel.calls, "seconds": kernel.seconds, "share": kernel.seconds / total}
            for kernel in found.kernels[:SHOWN]
        ],
        number_of_kernels=len(found.kernels),
        calls=sum(kernel.calls for kernel in found.kernels),
        seconds=total,
        **attention_of(device, found),
    )


def attention_of(device: Device, found: Profile) -> dict[str, Any]:
    """The operators and kernels that computed attention, and whether none of them has dense scores."""
    names = dict.fromkeys([*found.operators, *(kernel.name for kernel in found.kernels)])

    def named(parts: tuple[str, ...]) -> list[str]:
        return [name for name in names if any(part in name for part in parts)]

    fused, dense = named(_FUSED[device.name]), named(_DENSE[device.name])
    return {"attention": fused, "dense_attention": dense, "as_expected": bool(fused) and not dense}
