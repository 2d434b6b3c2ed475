"""Rates of a device and its links, measured with single operators for some seconds; the device kind ``cpu``."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from mindspeed_simpo.device import operators
from mindspeed_simpo.model.causal import causal_attention
from mindspeed_simpo.studies.plan.devices import Collective, DeviceKind, Link

_BIG, _SMALL = 2**20, 64
"""Numbers of a large and of a small message."""
_KINDS: tuple[Collective, ...] = ("reduce", "gather", "scatter", "exchange", "send")


def measure_cpu(ranks: int = 2) -> DeviceKind:
    """Measure matrix products, attention, norms, Adam and gloo's collectives in fp32, one thread a rank.

    No step of training is timed: host seconds of a layer are those of its operators on a few numbers.

    Args:
        ranks: Processes between which collectives are timed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates = Rates(torch.device("cpu"), torch.float32, hidden=256, tokens=512, heads=4, parameters=2**21)
        matmul, attention = rates.matmul_flops(), rates.attention_flops()
        peak = max(matmul, attention)
        layer = rates.layer_host_s()
        return DeviceKind(
            name="cpu",
            device="cpu",
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _cores(),
            bf16_flops=peak,
            fp32_flops=peak,
            matmul_efficiency=matmul / peak,
            attention_efficiency=attention / peak,
            memory_bytes_per_s=rates.values_bytes_per_s(),
            optimizer_bytes_per_s=rates.adam_bytes_per_s(),
            devices_per_host=1024,
            inside=_gloo(ranks),
            outside=Link(latency_s=1e-3, bytes_per_s=1e9),
            operator_s=rates.operator_s(),
            layer_host_s=layer,
            pass_host_s=2 * layer,
            step_host_s=10 * layer,
            cores=_cores(),
            notes="Rates measured with single operators on this host, fp32, one thread a rank.",
        )
    finally:
        torch.set_num_threads(threads)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fastest(run: Callable[[], object], wait: Callable[[], None], repeats: int = 7, *, waited: bool = True) -> float:
    """Seconds of the fastest call, to which other programs have added least; one call before is not counted.

    Args:
        run: What is timed.
        wait: Waits for the device.
        repeats: Timed calls.
        waited: Whether the wait for the device is timed; else the host's seconds alone.
    """
    run()
    found = []
    for _ in range(repeats):
        wait()
        begin = time.perf_counter()
        run()
        if waited:
            wait()
        found.append(time.perf_counter() - begin)
    wait()
    return min(found)


def _nothing() -> None:
    """Wait for a device whose work is done when a call returns."""


@dataclass(frozen=True)
class Rates:
    """Measurements of single operators of the engine on one device."""

    device: torch.device
    dtype: torch.dtype
    """Of the operators; Adam's numbers and the operators of :meth:`layer_host_s` are fp32."""
    hidden: int
    tokens: int
    heads: int
    """Of 64 elements, of the attention."""
    parameters: int
    """Of Adam."""
    wait: Callable[[], None] = _nothing
    """Waits for the device."""

    def _drawn(self, *shape: int, wide: bool = False) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.float32 if wide else self.dtype)

    def matmul_flops(self) -> float:
        """Of forward and backward of a projection."""
        inputs = self._drawn(self.tokens, self.hidden).requires_grad_()
        weight = self._drawn(4 * self.hidden, self.hidden).requires_grad_()
        upstream = self._drawn(self.tokens, 4 * self.hidden)

        def run() -> None:
            torch.nn.functional.linear(inputs, weight).backward(upstream)  # type: ignore[no-untyped-call]

        return 3 * 2 * self.tokens * 4 * self.hidden * self.hidden / _fastest(run, self.wait)

    def attention_flops(self) -> float:
        """Of forward and backward of causal attention, 3.5 forwards, of the pairs that the mask lets through."""
        dim = 64
        query, key, value = (self._drawn(self.tokens, 1, self.heads, dim).requires_grad_() for _ in range(3))
        upstream = self._drawn(self.tokens, 1, self.heads * dim)

        def run() -> None:
            causal_attention(query, key, value, dim**-0.5).backward(upstream)  # type: ignore[no-untyped-call]

        pairs = self.tokens * (self.tokens + 1) / 2
        return 3.5 * 2 * pairs * self.heads * 2 * dim / _fastest(run, self.wait)

    def values_bytes_per_s(self) -> float:
        """Of norm and activation, forward and backward, by the bytes that a simulation counts for them."""
        norm_inputs = self._drawn(self.tokens, self.hidden).requires_grad_()
        weight = torch.ones(self.hidden, device=self.device, dtype=self.dtype, requires_grad=True)
        gates = self._drawn(self.tokens, 8 * self.hidden).requires_grad_()
        upstreams = self._drawn(self.tokens, self.hidden), self._drawn(self.tokens, 4 * self.hidden)

        def run() -> None:
            operators.rms_norm(norm_inputs, weight, 1e-6).backward(upstreams[0])  # type: ignore[no-untyped-call]
            operators.swiglu(gates).backward(upstreams[1])  # type: ignore[no-untyped-call]

        # a norm reads and writes its input, the activation reads two numbers for each that it writes; a backward
        # does so twice
        counted = 3 * self.dtype.itemsize * self.tokens * (2 * self.hidden + 3 * 4 * self.hidden)
        return counted / _fastest(run, self.wait)

    def adam_bytes_per_s(self) -> float:
        """Of Adam, by the bytes that a simulation counts for it."""
        parameters = [torch.nn.Parameter(self._drawn(self.parameters // 8, wide=True)) for _ in range(8)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer = torch.optim.AdamW(parameters, lr=1e-6)
        # a simulation counts 40 bytes of each parameter for norm, clipping and Adam, of which Adam has 28
        return 28 * sum(parameter.numel() for parameter in parameters) / _fastest(optimizer.step, self.wait)

    def operator_s(self) -> float:
        """Of a product of a few numbers, many of which are queued."""
        inputs, weight = self._drawn(2, 16), self._drawn(16, 16)
        return _fastest(lambda: [torch.nn.functional.linear(inputs, weight) for _ in range(100)], self.wait) / 100

    def layer_host_s(self) -> float:
        """Forward of a layer's operators on a few numbers, where all of the time is the host's."""
        tokens, hidden, heads = 4, 32, 2
        inputs, weight = self._drawn(tokens, 1, hidden, wide=True), self._drawn(hidden, hidden, wide=True)
        inputs, weight = inputs.requires_grad_(), weight.requires_grad_()
        norm = torch.ones(hidden, device=self.device, requires_grad=True)
        gate = self._drawn(2 * hidden, hidden, wide=True).requires_grad_()

        def run() -> None:
            for _ in range(20):
                states = operators.rms_norm(inputs, norm, 1e-6)
                query, key, value = (
                    torch.nn.functional.linear(states, weight).view(tokens, 1, heads, -1) for _ in range(3)
                )
                states = inputs + torch.nn.functional.linear(causal_attention(query, key, value, 0.35), weight)
                inner = operators.swiglu(torch.nn.functional.linear(operators.rms_norm(states, norm, 1e-6), gate))
                states + torch.nn.functional.linear(inner, weight)

        return _fastest(run, self.wait, waited=False) / 20


def _gloo(ranks: int) -> Link:
    """Latency and rate of an all-reduce, and how much slower the other collectives are, between processes."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "seconds.pt"
        spawn(_time_collectives, args=(ranks, folder), nprocs=ranks)  # type: ignore[no-untyped-call]
        found = torch.load(results, weights_only=True)
    return link_of(found, ranks)


def link_of(found: dict[Collective, list[float]], ranks: int, numbers: int = _BIG) -> Link:
    """The link whose latency and rate fit the times of :func:`time_collectives`."""
    share, steps = (ranks - 1) / ranks, (ranks - 1).bit_length()
    small, large = found["reduce"]
    latency = small / (2 * steps)
    rate = 4 * numbers * 2 * share / max(large - small, 1e-9)
    link = Link(latency_s=latency, bytes_per_s=rate)
    slower = {}
    for kind in _KINDS:
        moved = {"reduce": 2 * share, "send": 1.0}.get(kind, share)
        slower[kind] = max(0.1, found[kind][1] / (moved * (latency * steps + 4 * numbers / rate)))
    return link.model_copy(update={"slower": slower})


def _time_collectives(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=2))
    found = time_collectives(torch.device("cpu"))
    if rank == 0:
        torch.save(found, Path(folder) / "seconds.pt")
    dist.barrier()
    dist.destroy_process_group()


def time_collectives(
    device: torch.device, wait: Callable[[], None] = _nothing, numbers: tuple[int, ...] = (_SMALL, _BIG)
) -> dict[Collective, list[float]]:
    """Seconds of each kind of collective between all ranks, for messages of so many fp32 numbers; a collective.

    Args:
        device: Of the messages.
        wait: Waits for the device.
        numbers: Of each message, multiples of the number of ranks.
    """
    # newer versions of torch have other names for these
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    ranks, found = dist.get_world_size(), {}
    for kind in _KINDS:
        times = []
        for number in numbers:
            whole, part = torch.zeros(number, device=device), torch.zeros(number // ranks, device=device)
            calls: dict[str, Callable[[], object]] = {
                "reduce": partial(dist.all_reduce, whole),
                "gather": partial(all_gather, whole, part),
                "scatter": partial(reduce_scatter, part, whole),
                "exchange": partial(dist.all_to_all_single, torch.empty_like(whole), whole),
                "send": partial(_ping_pong, dist.get_rank(), whole),
            }
            dist.barrier()
            times.append(_fastest(calls[kind], wait) / (2 if kind == "send" else 1))
        found[kind] = times
    return found


def _ping_pong(rank: int, tensor: torch.Tensor) -> None:
    if rank == 0:
        dist.send(tensor, 1)
        dist.recv(tensor, 1)
    elif rank == 1:
        dist.recv(tensor, 0)
        dist.send(tensor, 0)
