"""What a simulation knows of a device and of the links between devices: a small table, or a file of measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mindspeed_simpo.device import DeviceName
from mindspeed_simpo.errors import ConfigError

Collective = Literal["reduce", "gather", "scatter", "exchange", "send"]


class Link(BaseModel):
    """What one device sends to others: seconds of a step of a collective, and bytes a second one way."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    latency_s: float = Field(ge=0)
    bytes_per_s: float = Field(gt=0)
    """To all others together."""
    wires: int | None = Field(default=None, ge=1)
    """Wires that the bytes are divided over, one to each other device, of which a group uses those between its members;
    None where a switch gives all bytes to any of them."""
    slower: dict[Collective, float] = Field(default_factory=dict)
    """Factor of the time of a kind of collective; 1 where it is not named."""

    def rate(self, others: int) -> float:
        """Bytes a second, one way, of one device to so many others."""
        return self.bytes_per_s * (1.0 if self.wires is None else min(1.0, others / self.wires))


class DeviceKind(BaseModel):
    """Rates of one device; a file of ``--device-file`` has these keys.

    Rates are what the engine's operators reach, not peaks: a peak is multiplied by an efficiency first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    device: DeviceName
    memory_bytes: int = Field(gt=0)
    bf16_flops: float = Field(gt=0, description="Peak of dense matrix products in bf16, operations a second.")
    fp32_flops: float = Field(gt=0, description="Peak of dense matrix products in fp32, operations a second.")
    matmul_efficiency: float = Field(gt=0, le=1, description="Share of the peak that large matrix products reach.")
    attention_efficiency: float = Field(gt=0, le=1, description="Share of the peak that the attention kernel reaches.")
    memory_bytes_per_s: float = Field(gt=0, description="Bytes a second that norms, activations and rotations reach.")
    optimizer_bytes_per_s: float = Field(gt=0, description="Bytes a second that the optimizer's step reaches.")
    devices_per_host: int = Field(ge=1)
    inside: Link = Field(description="Between the devices of a host.")
    outside: Link = Field(description="Between hosts, for each device.")
    operator_s: float = Field(ge=0, description="Least seconds of one matrix product or attention call on the device.")
    layer_host_s: float = Field(ge=0, description="Seconds that the host needs for the forward of one layer.")
    experts_host_s: float = Field(
        ge=0, description="Seconds that the host needs for the experts of a layer's forward: choice, order and sums."
    )
    pass_host_s: float = Field(ge=0, description="Seconds that the host needs for a pass beside its layers.")
    step_host_s: float = Field(ge=0, description="Seconds that the host needs for a step beside its passes.")
    cores: int | None = Field(None, ge=1, description="Processor cores that the ranks of a host share; CPUs only.")
    notes: str = ""

    @property
    def asynchronous(self) -> bool:
        """Whether the host runs ahead of the device, so that the slower of both is waited for."""
        return self.device != "cpu"

    def matmul_flops(self, *, bf16: bool) -> float:
        """Operations a second of large matrix products."""
        return (self.bf16_flops if bf16 else self.fp32_flops) * self.matmul_efficiency

    def attention_flops(self, *, bf16: bool) -> float:
        """Operations a second of the attention kernel, of the (query, key) pairs that the mask lets through."""
        return (self.bf16_flops if bf16 else self.fp32_flops) * self.attention_efficiency


_GIB = 2**30
_NPU: dict[str, Any] = {
    "device": "npu",
    "matmul_efficiency": 0.7,
    "attention_efficiency": 0.35,
    "operator_s": 10e-6,
    "layer_host_s": 600e-6,
    "experts_host_s": 600e-6,
    "pass_host_s": 2e-3,
    "step_host_s": 30e-3,
    "notes": "Peaks and links from public figures; efficiencies, latencies and host seconds are assumptions.",
}
_GPU: dict[str, Any] = {
    "device": "cuda",
    "matmul_efficiency": 0.74,
    "attention_efficiency": 0.35,
    "operator_s": 5e-6,
    "layer_host_s": 400e-6,
    "experts_host_s": 400e-6,
    "pass_host_s": 2e-3,
    "step_host_s": 20e-3,
    "notes": "Peaks and links from data sheets; the efficiency of matrix products from a published head's; attention's "
    "from FlashAttention-2 on H100; latencies and host seconds are assumptions.",
}
_HCCS_MESH = Link(latency_s=10e-6, bytes_per_s=196e9, wires=7)
_HCCS_SWITCH = Link(latency_s=10e-6, bytes_per_s=196e9)
_ROCE_200 = Link(latency_s=15e-6, bytes_per_s=25e9)
_INFINIBAND_400 = Link(latency_s=10e-6, bytes_per_s=50e9)
_NVLINK = Link(latency_s=5e-6, bytes_per_s=450e9)

KINDS: dict[str, DeviceKind] = {
    kind.name: kind
    for kind in (
        DeviceKind(
            name="910B-64GB",
            memory_bytes=64 * _GIB,
            bf16_flops=295e12,
            fp32_flops=73.7e12,
            memory_bytes_per_s=1.1e12,
            optimizer_bytes_per_s=1.1e12,
            devices_per_host=8,
            inside=_HCCS_MESH,
            outside=_ROCE_200,
            **_NPU,
        ),
        DeviceKind(
            name="910B-32GB",
            memory_bytes=32 * _GIB,
            bf16_flops=264e12,
            fp32_flops=66e12,
            memory_bytes_per_s=0.55e12,
            optimizer_bytes_per_s=0.55e12,
            devices_per_host=8,
            inside=_HCCS_MESH,
            outside=_ROCE_200,
            **_NPU,
        ),
        DeviceKind(
            name="A3",
            memory_bytes=64 * _GIB,
            bf16_flops=354e12,
            fp32_flops=88.5e12,
            memory_bytes_per_s=1.1e12,
            optimizer_bytes_per_s=1.1e12,
            devices_per_host=16,
            inside=_HCCS_SWITCH,
            outside=_ROCE_200,
            **_NPU,
        ),
        DeviceKind(
            name="H100",
            memory_bytes=80 * _GIB,
            bf16_flops=989e12,
            fp32_flops=67e12,
            memory_bytes_per_s=2.3e12,
            optimizer_bytes_per_s=2.3e12,
            devices_per_host=8,
            inside=_NVLINK,
            outside=_INFINIBAND_400,
            **_GPU,
        ),
        DeviceKind(
            name="H200",
            memory_bytes=141 * 10**9,
            bf16_flops=989e12,
            fp32_flops=67e12,
            memory_bytes_per_s=3.3e12,
            optimizer_bytes_per_s=3.3e12,
            devices_per_host=8,
            inside=_NVLINK,
            outside=_INFINIBAND_400,
            **_GPU,
        ),
    )
}
"""Kinds by name; docs/planning.md has the source of each number. An A3 NPU has two dies, each of which is a device."""

CPU = "cpu"
"""The kind that is measured on this host."""


def find_kind(name: str | None, file: str | None) -> DeviceKind:
    """The kind of that name, or of that file; ``cpu`` measures this host for about half a minute.

    Raises:
        ConfigError: where both or none is given, the name is unknown, or the file is not such a record.
    """
    if (name is None) == (file is None):
        raise ConfigError(f"expected one of --device-kind ({', '.join([*KINDS, CPU])}) and --device-file")
    if file is not None:
        return read_kind(Path(file))
    if name == CPU:
        from mindspeed_simpo.studies.plan.calibration import measure_cpu

        return measure_cpu()
    if name not in KINDS:
        raise ConfigError(f"--device-kind: expected one of {', '.join([*KINDS, CPU])}, found {name!r}")
    return KINDS[name]


def read_kind(path: Path) -> DeviceKind:
    """The record in a JSON file.

    Raises:
        ConfigError: where the file is no such record; the message names the keys.
    """
    try:
        return DeviceKind(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"--device-file {path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg'].lower()}" for each in error.errors())
        raise ConfigError(f"--device-file {path}: {found}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--device-file {path}: expected a JSON object of a device's rates: {error}") from None
