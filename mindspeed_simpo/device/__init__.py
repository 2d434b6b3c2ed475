"""The one place that knows which accelerator runs the program, and the only one that patches anything.

``open_device`` must run before anything imports ``megatron``: on ``npu`` MindSpeed's adaptor and on ``cpu`` this
package's own one replace what megatron-core takes for granted about CUDA.
"""

from __future__ import annotations

import logging
import random
import resource
import sys
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mindspeed_simpo.device import cpu, megatron_repairs, npu
from mindspeed_simpo.errors import ConfigError

DeviceName = Literal["npu", "cuda", "cpu"]
_BACKENDS: dict[DeviceName, str] = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}


@dataclass(frozen=True)
class Device:
    """An opened device: where tensors live and which collectives library connects the ranks."""

    name: DeviceName
    torch_device: torch.device

    @property
    def backend(self) -> str:
        """``torch.distributed`` backend: hccl, nccl or gloo."""
        return _BACKENDS[self.name]

    @property
    def is_cpu(self) -> bool:
        """Whether tensors live in host memory and collectives run over gloo."""
        return self.name == "cpu"

    @property
    def reduction_dtype(self) -> torch.dtype:
        """See :func:`reduction_dtype`."""
        return reduction_dtype(self.torch_device)

    def seed(self, seed: int) -> None:
        """Seed every generator of this process: Python's, and torch's on the host and on the device."""
        random.seed(seed)
        torch.manual_seed(seed)

    def synchronize(self) -> None:
        """Wait for the work queued on the device."""
        if not self.is_cpu:
            self._accelerator().synchronize()

    def assert_async(self, condition: torch.Tensor, message: str) -> None:
        """Let no later work of the device run where ``condition``, one boolean, is false; the host does not wait.

        On an accelerator the error surfaces where the host next waits for the device, on a CPU at once.
        """
        torch._assert_async(condition, message)

    def peak_memory_bytes(self) -> int:
        """Largest memory of this process so far: allocated on the device, or resident (RSS) on the CPU."""
        if self.is_cpu:
            kilobyte = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte
        return int(self._accelerator().max_memory_allocated())

    def rng_state(self) -> dict[str, Any]:
        """State of every generator that :meth:`seed` seeds, for a checkpoint."""
        state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
        if not self.is_cpu:
            state["device"] = self._accelerator().get_rng_state()
        return state

    def set_rng_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`rng_state` returned."""
        random.setstate(state["python"])
        torch.set_rng_state(state["torch"])
        if not self.is_cpu and "device" in state:
            self._accelerator().set_rng_state(state["device"])

    def _accelerator(self) -> Any:
        return getattr(torch, self.name)


def reduction_dtype(device: torch.device) -> torch.dtype:
    """Widest floating type that a device and its collectives add; sums over tokens and pairs are kept in it."""
    # MindSpeed's all_reduce adds a copy of an fp64 tensor and leaves the tensor as it was
    narrow = device.type == "npu" or "mindspeed" in sys.modules
    return torch.float32 if narrow else torch.float64


def open_device(name: Literal["auto", "npu", "cuda", "cpu"], local_rank: int = 0) -> Device:
    """Choose the device of this rank and prepare ``torch`` and ``megatron`` for it.

    Args:
        name: ``auto`` takes the first found of npu, cuda, cpu.
        local_rank: Rank on this host; the index of the accelerator.

    Raises:
        ConfigError: where the named device is not there, or the host has fewer of them than ranks.
    """
    # megatron-core tells every rank, several times, that apex and TransformerEngine are not installed
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    # megatron-core calls collectives by names that newer torch deprecates
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")
    # imported by megatron-core: a host with a CUDA compiler and no device is told so on every start
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    found = find_device() if name == "auto" else name
    if found == "cpu":
        cpu.install_adaptor()
    elif found == "npu":
        npu.install_adaptor()
    megatron_repairs.repair()
    if found == "cpu":
        return Device("cpu", torch.device("cpu"))
    accelerator = getattr(torch, found, None)
    if accelerator is None or not accelerator.is_available():
        raise ConfigError(f"device: {found} is not available on this host; set device: auto or device: cpu")
    if local_rank >= accelerator.device_count():
        raise ConfigError(
            f"rank {local_rank} of this host has no {found} of its own: {accelerator.device_count()} found; "
            "start as many ranks as there are devices (--nproc-per-node)"
        )
    accelerator.set_device(local_rank)
    return Device(found, torch.device(found, local_rank))


def find_device() -> DeviceName:
    """The first of npu, cuda and cpu that this host has."""
    if npu.is_available():
        return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"
