"""Rates of a device and its links, measured with single operators: of this host in about 20 s, the kind ``cpu``."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from mindspeed_simpo.studies.plan.collectives import Group, seconds
from mindspeed_simpo.studies.plan.devices import Collective, DeviceKind, Link
from mindspeed_simpo.studies.plan.rates import REPEATS, Rates

_SIZES = (64, 2**18)
"""Numbers of a small and of a large message."""
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
        rates = Rates(torch.device("cpu"), torch.float32, hidden=256, tokens=512, heads=4, parameters=2**21)
        matmul, attention = rates.matmul_flops(), rates.attention_flops()
        peak = max(matmul, attention)
        layer = rates.layer_host_s()
        plain = DeviceKind(
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
            inside=Link(latency_s=0, bytes_per_s=1),
            outside=Link(latency_s=1e-3, bytes_per_s=1e9),
            operator_s=rates.operator_s(),
            layer_host_s=layer,
            experts_host_s=rates.experts_host_s(),
            pass_host_s=2 * layer,
            step_host_s=10 * layer,
            cores=_cores(),
            notes="Rates measured with single operators on this host, fp32, one thread a rank.",
        )
        return plain.model_copy(update={"inside": _gloo(plain, rates, ranks)})
    finally:
        torch.set_num_threads(threads)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gloo(plain: DeviceKind, rates: Rates, ranks: int) -> Link:
    """The link between processes of this host."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "seconds.pt"
        spawn(_time_on_rank, args=(ranks, folder, rates), nprocs=ranks)  # type: ignore[no-untyped-call]
        found = torch.load(results, weights_only=True)
    return link_of(plain, found, ranks, _SIZES)


def link_of(plain: DeviceKind, found: Mapping[Collective, Sequence[float]], ranks: int, numbers: Sequence[int]) -> Link:
    """The median latency of a step of all collectives, the rate of an all-reduce, and how much slower each of them is.

    Args:
        plain: The device; its links are not read.
        found: From :func:`time_collectives`.
        ranks: Devices of one host that took part.
        numbers: Of the messages, a small and a large one.
    """
    small, large = found["reduce"]
    moved = 4 * (numbers[1] - numbers[0]) * 2 * (ranks - 1) / ranks
    steps = {kind: {"reduce": 2, "send": 1 / (ranks - 1).bit_length()}.get(kind, 1) for kind in _KINDS}
    latency = statistics.median(found[kind][0] / steps[kind] for kind in _KINDS) / (ranks - 1).bit_length()
    link = Link(latency_s=latency, bytes_per_s=moved / max(large - small, large / 10))
    device, sizes = plain.model_copy(update={"inside": link}), 4 * np.array(numbers)
    slower = {
        kind: sum(found[kind]) / float(seconds(kind, sizes, Group(ranks, ranks), device).sum()) for kind in _KINDS
    }
    return link.model_copy(update={"slower": slower})


def _time_on_rank(rank: int, ranks: int, folder: str, rates: Rates) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=2))
    found = time_collectives(rates, _SIZES)
    if rank == 0:
        torch.save(found, Path(folder) / "seconds.pt")
    dist.barrier()
    dist.destroy_process_group()


def time_collectives(rates: Rates, numbers: Sequence[int]) -> dict[Collective, list[float]]:
    """Seconds of each kind of collective between all ranks, for messages of so many fp32 numbers; a collective.

    The seconds are those by which a collective prolongs a matrix product: after a product the processes wait for each
    other, and gloo's threads have to wake up, so that these are several times the seconds of collectives in succession.

    Args:
        rates: The device, and the size of the product.
        numbers: Multiples of the number of ranks.
    """
    # newer versions of torch have other names for these
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    ranks, device = dist.get_world_size(), rates.device
    product = rates.product()
    found: dict[Collective, list[float]] = {}
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
            exposed = max(_exposed(rates, product, calls[kind]), 1e-6)
            times.append(exposed / (2 if kind == "send" else 1))
        found[kind] = times
    return found


def _exposed(rates: Rates, product: Callable[[], object], call: Callable[[], object]) -> float:
    """Median seconds by which the call prolongs the product, each time beside the product alone."""
    return statistics.median(
        _between_barriers(rates, product, call) - _between_barriers(rates, product) for _ in range(REPEATS)
    )


def _between_barriers(rates: Rates, *calls: Callable[[], object]) -> float:
    """Seconds of all calls, one after the other; every process takes part."""
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(_COLLECTIVES):
        for call in calls:
            call()
    rates.wait()
    dist.barrier()
    return (time.perf_counter() - begin) / _COLLECTIVES


def _ping_pong(rank: int, tensor: torch.Tensor) -> None:
    if rank == 0:
        dist.send(tensor, 1)
        dist.recv(tensor, 1)
    elif rank == 1:
        dist.recv(tensor, 0)
        dist.send(tensor, 0)
