"""Rates of this host's processor, measured with single operators for about twenty seconds: the device kind ``cpu``."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from mindspeed_simpo.device import operators
from mindspeed_simpo.device.grouped import grouped_linear
from mindspeed_simpo.model.causal import causal_attention
from mindspeed_simpo.model.routes import routes_of, take
from mindspeed_simpo.studies.plan.collectives import Group, seconds
from mindspeed_simpo.studies.plan.devices import Collective, DeviceKind, Link

_REPEATS = 7
_HIDDEN, _TOKENS = 256, 512
_BIG, _SMALL = 2**18, 64
"""Numbers of a large and of a small message."""
_COLLECTIVES = 20
"""Products, and collectives between them, that are timed together."""
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
        matmul, attention = _matmul_flops(), _attention_flops()
        peak = max(matmul, attention)
        layer = _layer_host_s()
        plain = DeviceKind(
            name="cpu",
            device="cpu",
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _cores(),
            bf16_flops=peak,
            fp32_flops=peak,
            matmul_efficiency=matmul / peak,
            attention_efficiency=attention / peak,
            memory_bytes_per_s=_values_bytes_per_s(),
            optimizer_bytes_per_s=_adam_bytes_per_s(),
            devices_per_host=1024,
            inside=Link(latency_s=0, bytes_per_s=1),
            outside=Link(latency_s=1e-3, bytes_per_s=1e9),
            operator_s=_operator_s(),
            layer_host_s=layer,
            experts_host_s=_experts_host_s(),
            pass_host_s=2 * layer,
            step_host_s=10 * layer,
            cores=_cores(),
            notes="Rates measured with single operators on this host, fp32, one thread a rank.",
        )
        return plain.model_copy(update={"inside": _gloo(plain, ranks)})
    finally:
        torch.set_num_threads(threads)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fastest(run: Callable[[], object], repeats: int = _REPEATS) -> float:
    """Seconds of the fastest call, to which other programs have added least; one call before is not counted."""
    run()
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return min(found)


def _matmul_flops() -> float:
    """Of forward and backward of a projection."""
    inputs = torch.randn(_TOKENS, _HIDDEN, requires_grad=True)
    weight = torch.randn(4 * _HIDDEN, _HIDDEN, requires_grad=True)
    upstream = torch.randn(_TOKENS, 4 * _HIDDEN)

    def run() -> None:
        torch.nn.functional.linear(inputs, weight).backward(upstream)  # type: ignore[no-untyped-call]

    return 3 * 2 * _TOKENS * 4 * _HIDDEN * _HIDDEN / _fastest(run)


def _attention_flops() -> float:
    """Of forward and backward of causal attention, of the pairs that the mask lets through; 3.5 forwards together."""
    heads, dim = 4, 64
    query, key, value = (torch.randn(_TOKENS, 1, heads, dim, requires_grad=True) for _ in range(3))
    upstream = torch.randn(_TOKENS, 1, heads * dim)

    def run() -> None:
        causal_attention(query, key, value, dim**-0.5).backward(upstream)  # type: ignore[no-untyped-call]

    pairs = _TOKENS * (_TOKENS + 1) / 2
    return 3.5 * 2 * pairs * heads * 2 * dim / _fastest(run)


def _values_bytes_per_s() -> float:
    """Of norm and activation, forward and backward, by the bytes that a simulation counts for them."""
    norm_inputs = torch.randn(_TOKENS, _HIDDEN, requires_grad=True)
    weight = torch.ones(_HIDDEN, requires_grad=True)
    gates = torch.randn(_TOKENS, 8 * _HIDDEN, requires_grad=True)
    upstreams = torch.randn(_TOKENS, _HIDDEN), torch.randn(_TOKENS, 4 * _HIDDEN)

    def run() -> None:
        operators.rms_norm(norm_inputs, weight, 1e-6).backward(upstreams[0])  # type: ignore[no-untyped-call]
        operators.swiglu(gates).backward(upstreams[1])  # type: ignore[no-untyped-call]

    # a norm reads and writes its input, the activation reads two numbers for each that it writes; backward twice that
    counted = 3 * 4 * _TOKENS * (2 * _HIDDEN + 3 * 4 * _HIDDEN)
    return counted / _fastest(run)


def _adam_bytes_per_s() -> float:
    parameters = [torch.nn.Parameter(torch.randn(2**18)) for _ in range(8)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    # a simulation counts 40 bytes of each parameter for norm, clipping and Adam, of which Adam has 28
    return 28 * sum(parameter.numel() for parameter in parameters) / _fastest(optimizer.step)


def _operator_s() -> float:
    inputs, weight = torch.randn(2, 16), torch.randn(16, 16)
    return _fastest(lambda: [torch.nn.functional.linear(inputs, weight) for _ in range(100)]) / 100


def _layer_host_s() -> float:
    """Forward of a layer's operators on a few numbers, where all of the time is the host's."""
    tokens, hidden, heads = 4, 16, 2
    inputs, weight = torch.randn(tokens, 1, hidden, requires_grad=True), torch.randn(hidden, hidden, requires_grad=True)
    norm, gate = torch.ones(hidden, requires_grad=True), torch.randn(2 * hidden, hidden, requires_grad=True)

    def run() -> None:
        for _ in range(20):
            states = operators.rms_norm(inputs, norm, 1e-6)
            query, key, value = (
                torch.nn.functional.linear(states, weight).view(tokens, 1, heads, -1) for _ in range(3)
            )
            states = inputs + torch.nn.functional.linear(causal_attention(query, key, value, 0.35), weight)
            inner = operators.swiglu(torch.nn.functional.linear(operators.rms_norm(states, norm, 1e-6), gate))
            states + torch.nn.functional.linear(inner, weight)

    return _fastest(run) / 20


def _experts_host_s() -> float:
    """Forward of four experts of few tokens, without their activation, which a layer without experts has too."""
    tokens, hidden, experts, chosen = 8, 16, 4, 2
    states, router = torch.randn(tokens, hidden, requires_grad=True), torch.randn(experts, hidden, requires_grad=True)
    first, second = (torch.randn(experts, hidden, hidden, requires_grad=True) for _ in range(2))

    def run() -> None:
        for _ in range(20):
            scores = torch.nn.functional.linear(states, router).softmax(-1)
            best = scores.detach().topk(chosen, dim=-1).indices
            weights = scores.gather(1, best)
            weights = weights / weights.sum(-1, keepdim=True)
            routes = routes_of(best, experts, experts, 1)
            rows = take(states, routes.token, routes.place)
            rows = grouped_linear(grouped_linear(rows, first, routes.counts), second, routes.counts)
            outputs = take(rows, routes.place.flatten(), routes.copy[:, None])
            torch.bmm(weights[:, None], outputs.view(tokens, chosen, -1))

    return _fastest(run) / 20


def _gloo(plain: DeviceKind, ranks: int) -> Link:
    """Latency and rate of an all-reduce, and how much slower the other collectives are, between processes.

    The seconds are those by which a collective prolongs a matrix product: after a product the processes wait for each
    other, and gloo's threads have to wake up, so that these are several times the seconds of collectives in succession.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "seconds.pt"
        spawn(_time_collectives, args=(ranks, folder), nprocs=ranks)  # type: ignore[no-untyped-call]
        found = torch.load(results, weights_only=True)
    small, large = found["reduce"]
    moved = 4 * (_BIG - _SMALL) * 2 * (ranks - 1) / ranks
    link = Link(latency_s=small / (2 * (ranks - 1).bit_length()), bytes_per_s=moved / max(large - small, 1e-6))
    device = plain.model_copy(update={"inside": link})
    slower = {}
    for kind in _KINDS:
        sizes = 4 * np.array([_SMALL, _BIG])
        slower[kind] = float(np.mean(found[kind] / seconds(kind, sizes, Group(ranks, ranks), device)))
    return link.model_copy(update={"slower": slower})


def _time_collectives(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=2))
    # newer versions of torch have other names for these
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    inputs, weight = torch.randn(_TOKENS, _HIDDEN), torch.randn(4 * _HIDDEN, _HIDDEN)
    product = partial(torch.nn.functional.linear, inputs, weight)
    alone = _between_barriers(product)
    found = {}
    for kind in _KINDS:
        times = []
        for numbers in (_SMALL, _BIG):
            whole, part = torch.zeros(numbers), torch.zeros(numbers // ranks)
            calls: dict[str, Callable[[], object]] = {
                "reduce": partial(dist.all_reduce, whole),
                "gather": partial(all_gather, whole, part),
                "scatter": partial(reduce_scatter, part, whole),
                "exchange": partial(dist.all_to_all_single, torch.empty_like(whole), whole),
                "send": partial(_ping_pong, rank, whole),
            }
            exposed = max(_between_barriers(product, calls[kind]) - alone, 1e-6)
            times.append(exposed / (2 if kind == "send" else 1))
        found[kind] = times
    if rank == 0:
        torch.save(found, Path(folder) / "seconds.pt")
    dist.barrier()
    dist.destroy_process_group()


def _between_barriers(*calls: Callable[[], object]) -> float:
    """Median seconds of all calls, one after the other; every process takes part."""
    found = []
    for _ in range(_REPEATS):
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(_COLLECTIVES):
            for call in calls:
                call()
        dist.barrier()
        found.append((time.perf_counter() - begin) / _COLLECTIVES)
    return statistics.median(found)


def _ping_pong(rank: int, tensor: torch.Tensor) -> None:
    if rank == 0:
        dist.send(tensor, 1)
        dist.recv(tensor, 1)
    elif rank == 1:
        dist.recv(tensor, 0)
        dist.send(tensor, 0)
