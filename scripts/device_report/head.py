"""The output layer with the log-probabilities alone, forward and backward, beside its bare matrix products."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindspeed_simpo.device import Device
from scripts.device_report.job import Job
from scripts.device_report.workload import open_world, seconds_of


def run(job: Job) -> None:
    """A row for the bare products, the fused head and the head with whole logits."""
    device = job.open_device()
    groups = open_world(device)
    from mindspeed_simpo.config.resolution import default_chunk_tokens
    from mindspeed_simpo.loss.head import ResponseHead

    tokens, hidden, vocabulary = (256, 64, 2048) if job.small else (8192, 4096, 151_936)
    dtype = torch.float32 if device.is_cpu else torch.bfloat16
    generator = torch.Generator(device.torch_device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device.torch_device, dtype=dtype)

    states = drawn(tokens, hidden).requires_grad_()
    weight = torch.nn.Parameter(drawn(vocabulary, hidden) * hidden**-0.5)
    # the place of the gradient is there before and after, as megatron-core's DDP holds it
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device=device.torch_device)
    upstream = torch.full((tokens,), 1 / tokens, dtype=device.reduction_dtype, device=device.torch_device)
    row = {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary, "dtype": str(dtype).removeprefix("torch.")}
    bare = _row(job, device, {**row, "head": "bare products"}, lambda: _products(states, weight), None)
    for name, chunk in (("fused", default_chunk_tokens(device.name, vocabulary)), ("whole logits", None)):
        head = ResponseHead(
            groups.tensor,
            groups.context,
            vocab_size=vocabulary,
            sum_dtype=device.reduction_dtype,
            chunk_tokens=chunk,
            weight_grad_awaited=False,
        )

        def step(head: ResponseHead = head) -> None:
            states.grad = weight.grad = None
            head.token_logprobs(states, weight, targets).backward(upstream)

        if job.has_time_for(f"head, {name}"):
            _row(job, device, {**row, "head": name, "chunk_tokens": chunk}, step, bare)


@torch.no_grad()
def _products(states: Tensor, weight: Tensor) -> None:
    """Logits, gradient of the states and gradient of the weight."""
    logits = states @ weight.t()
    logits @ weight
    logits.t() @ states


def _row(job: Job, device: Device, row: dict[str, Any], step: Callable[[], None], bare: float | None) -> float | None:
    before = 0
    try:
        step()
        if not device.is_cpu:
            device.release_memory()
            device.reset_peak_memory()
            before = device.peak_memory_bytes()
        seconds = statistics.median(seconds_of(device, step, 5, warm_ups=1))
    except RuntimeError as error:  # such as of memory; devices have classes of their own for it
        job.add(**row, crashed=str(error)[-1500:])
        return None
    flops = 6.0 * row["tokens"] * row["hidden"] * row["vocabulary"]
    job.add(
        **row,
        seconds=seconds,
        flops_per_second=flops / seconds,
        times_bare=None if bare is None else seconds / bare,
        extra_bytes=None if device.is_cpu else device.peak_memory_bytes() - before,
    )
    return seconds
