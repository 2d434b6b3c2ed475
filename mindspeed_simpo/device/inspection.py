"""What a device did while a function ran: its kernels and their time, and how often the host waited for it."""

from __future__ import annotations

import collections
import contextlib
import csv
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType

from mindspeed_simpo.device import Device


@dataclass(frozen=True)
class Kernel:
    """Calls of a kernel, or on the CPU of an operator without those that it calls."""

    name: str
    calls: int
    seconds: float
    """Of all calls."""


@dataclass(frozen=True)
class Profile:
    """What ran."""

    kernels: tuple[Kernel, ...]
    """Of the device, the slowest first."""
    operators: tuple[str, ...]
    """Names of the operators of PyTorch that were called; on NPUs the types of the kernels."""


def profile(device: Device, run: Callable[[], object]) -> Profile:
    """Run a function once under the profiler of the device.

    Args:
        device: Its accelerator is waited for at the end.
        run: Its first call should lie behind, for it may set up kernels.
    """
    if device.name == "npu":
        return _profile_npu(device, run)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not device.is_cpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as seen:
        run()
        device.synchronize()
    events = seen.key_averages()
    time_of = "self_cpu_time_total" if device.is_cpu else "self_device_time_total"
    kernels = [
        Kernel(each.key, each.count, 1e-6 * getattr(each, time_of))
        for each in events
        if device.is_cpu or each.device_type == DeviceType.CUDA
    ]
    operators = sorted({each.key for each in events if each.device_type == DeviceType.CPU})
    return Profile(_slowest_first(kernels), tuple(operators))


def _profile_npu(device: Device, run: Callable[[], object]) -> Profile:
    """By torch_npu's profiler, which writes ``kernel_details.csv`` with a line for each call.

    Source: torch_npu.profiler.profile and tensorboard_trace_handler in docs/zh/custom_APIs of Ascend's op-plugin;
    columns of kernel_details.csv in the guide of CANN's profiling tools (Name, Type, Duration(us)).
    """
    import torch_npu

    profiler = torch_npu.profiler
    with tempfile.TemporaryDirectory() as folder:
        with profiler.profile(
            activities=[profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU],
            on_trace_ready=profiler.tensorboard_trace_handler(folder),
            experimental_config=profiler._ExperimentalConfig(profiler_level=profiler.ProfilerLevel.Level1),
        ):
            run()
            device.synchronize()
        [path] = Path(folder).rglob("kernel_details.csv")
        return read_kernel_details(path)


def read_kernel_details(path: Path) -> Profile:
    """The kernels, by their type, in a file of torch_npu's profiler."""
    seconds: dict[str, float] = collections.defaultdict(float)
    calls: dict[str, int] = collections.Counter()
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            kind = (row.get("Type") or "").strip()
            name = kind if kind not in ("", "N/A") else row["Name"].strip()
            seconds[name] += 1e-6 * float(row["Duration(us)"])
            calls[name] += 1
    kernels = [Kernel(name, calls[name], total) for name, total in seconds.items()]
    return Profile(_slowest_first(kernels), tuple(sorted(seconds)))


def _slowest_first(kernels: list[Kernel]) -> tuple[Kernel, ...]:
    return tuple(sorted(kernels, key=lambda kernel: -kernel.seconds))


@dataclass
class Waits:
    """Host synchronisations."""

    places: collections.Counter[str] = field(default_factory=collections.Counter)
    """How often at each place, ``FILE:LINE of FUNCTION``: the innermost of the package, else of the program."""


@contextlib.contextmanager
def waits_of_host(device: Device, package: str = "mindspeed_simpo") -> Iterator[Waits]:
    """Count the operations that make the host wait for the accelerator, by its synchronisation debug mode.

    The mode warns of each; ``torch.cuda`` and ``torch.npu`` have it under the same name. Collectives are not covered.

    Args:
        device: An accelerator; a CPU has nothing to wait for.
        package: Where a place is looked for.
    """
    assert not device.is_cpu, "the debug mode belongs to an accelerator"
    accelerator = getattr(torch, device.name)
    found = Waits()

    def show(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message).lower() and "prototype" not in str(message):
            found.places[_place(package)] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        before = accelerator.get_sync_debug_mode()
        accelerator.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            accelerator.set_sync_debug_mode(before)


def _place(package: str) -> str:
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    of_package = [frame for frame in frames if f"/{package}/" in frame.filename]
    frame = (of_package or [each for each in frames if "/warnings.py" not in each.filename] or frames)[-1]
    name = frame.filename.rpartition(f"/{package}/")[2] if of_package else frame.filename
    return f"{name}:{frame.lineno} of {frame.name}"
