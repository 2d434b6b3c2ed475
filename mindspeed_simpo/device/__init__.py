"""The accelerator of this rank: devices, operators, and all patches of torch and megatron-core.

No other package names ``torch_npu`` or patches anything. ``open_device`` must run before ``megatron`` is imported: on
``npu`` MindSpeed's adaptor, and on ``cpu`` the adaptor of this package, replaces megatron-core's calls of CUDA.
"""

from __future__ import annotations

import logging
import os
import random
import resource
import sys
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mindspeed_simpo.device import cpu, cuda_environment, megatron_repairs, npu, npu_adaptor, npu_environment
from mindspeed_simpo.errors import ConfigError

DeviceName = Literal["npu", "cuda", "cpu"]
_BACKENDS: dict[DeviceName, str] = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}


@dataclass(frozen=True)
class Device:
    """An opened device: the ``torch.device`` of tensors and the backend of collectives."""

    name: DeviceName
    torch_device: torch.device

    @property
    def backend(self) -> str:
        """``torch.distributed`` backend: hccl, nccl or gloo."""
        return _BACKENDS[self.name]

    @property
    def is_cpu(self) -> bool:
        """Whether tensors are in host memory and collectives run over gloo."""
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
        """Assert ``condition`` on the device without a host synchronisation; no later work of the device then runs.

        Args:
            condition: One boolean, on this device.
            message: Text of the error.

        Raises:
            RuntimeError: where ``condition`` is false; on an accelerator from the next host synchronisation, on a CPU
                from this call.
        """
        torch._assert_async(condition, message)

    def peak_memory_bytes(self) -> int:
        """Peak memory of this process so far, bytes: allocated on the accelerator, or resident (RSS) on the CPU."""
        if self.is_cpu:
            kilobyte = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte
        return int(self._accelerator().max_memory_allocated())

    def reset_peak_memory(self) -> None:
        """Let :meth:`peak_memory_bytes` count from now on; the peak of a process on the CPU cannot be reset."""
        if not self.is_cpu:
            self._accelerator().reset_peak_memory_stats()

    def product_name(self) -> str | None:
        """What the accelerator calls itself, such as ``Ascend910B3``; None on the CPU."""
        return None if self.is_cpu else str(self._accelerator().get_device_name(self.torch_device.index))

    def count(self) -> int:
        """Accelerators of this host; 0 on the CPU."""
        return 0 if self.is_cpu else int(self._accelerator().device_count())

    def memory_bytes(self) -> int | None:
        """Memory of the accelerator, bytes; None on the CPU."""
        return None if self.is_cpu else int(self._accelerator().mem_get_info()[1])

    def release_memory(self) -> None:
        """Give back what freed tensors have left in the allocator."""
        if not self.is_cpu:
            self._accelerator().empty_cache()

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
    """The dtype of sums over tokens and pairs: the widest that the device and its collectives add, fp64 or fp32."""
    # MindSpeed's all_reduce reduces a copy of an fp64 tensor and does not write the result back
    narrow = device.type == "npu" or "mindspeed" in sys.modules
    return torch.float32 if narrow else torch.float64


def open_device(
    name: Literal["auto", "npu", "cuda", "cpu"],
    local_rank: int = 0,
    timeout_minutes: float | None = None,
    *,
    one_queue: bool = False,
) -> Device:
    """Choose the device of this rank and prepare ``torch`` and ``megatron`` for it.

    With ``DETERMINISTIC=1`` in the environment torch's deterministic algorithms are switched on.

    Args:
        name: ``auto`` takes the first available of npu, cuda, cpu.
        local_rank: Rank on this host; the index of the accelerator.
        timeout_minutes: Timeout of the process groups that will be made; HCCL's follows it.
        one_queue: See :func:`~mindspeed_simpo.device.cuda_environment.set_defaults`.

    Raises:
        ConfigError: where the named device is not available, the host has fewer devices than ranks, or the versions of
            MindSpeed and megatron-core do not belong together.
    """
    # megatron-core warns on every rank, several times, that apex and TransformerEngine are not installed
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    # megatron-core calls collectives by names that newer versions of torch deprecate
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")
    # megatron-core imports this module, which warns on every start on a host with a CUDA compiler and no device
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if name in ("auto", "cuda"):
        cuda_environment.set_defaults(one_queue=one_queue)
    found = find_device() if name == "auto" else name
    if found == "cpu":
        cpu.install_adaptor()
    elif found == "npu":
        npu_environment.set_defaults(timeout_minutes)
        npu_adaptor.install_adaptor()
    if npu_environment.is_deterministic():
        _use_deterministic_algorithms()
    megatron_repairs.repair()
    if found == "cpu":
        cpu.wait_for_gathers()
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


def _use_deterministic_algorithms() -> None:
    # cuBLAS reads this when it makes its first handle; torch refuses to be deterministic without it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
