"""Rates of single operators, and the record of the device for ``mindspeed-simpo plan --device-file``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_simpo.device import Device
from mindspeed_simpo.studies.plan.devices import KINDS, DeviceKind, Link
from scripts.device_report.job import Job

if TYPE_CHECKING:
    from mindspeed_simpo.studies.plan.rates import Rates

_OTHER_PEAKS = {"A100": 312e12, "A800": 312e12, "H800": 989e12, "H20": 148e12, "L40S": 362e12, "GH200": 989e12}
"""Dense bf16, operations a second, by a part of the product's name; NVIDIA's data sheets."""


def rates_of(job: Job, device: Device, dtype: torch.dtype | None = None) -> Rates:
    """The measurements for this device; by default in the dtype that it trains in."""
    from mindspeed_simpo.studies.plan.rates import Rates

    if job.small:
        sizes = {"hidden": 128, "tokens": 128, "heads": 2, "parameters": 2**16}
    else:
        sizes = {"hidden": 4096, "tokens": 8192, "heads": 32, "parameters": 2**27}
    used = dtype or (torch.float32 if device.is_cpu else torch.bfloat16)
    return Rates(device.torch_device, used, **sizes, wait=device.synchronize)


def run(job: Job) -> None:
    """One row with all rates."""
    device = job.open_device()
    used = rates_of(job, device)
    job.add(
        matmul_flops_bf16=rates_of(job, device, torch.bfloat16).matmul_flops(),
        matmul_flops_fp32=rates_of(job, device, torch.float32).matmul_flops(),
        attention_flops=used.attention_flops(),
        memory_bytes_per_s=used.values_bytes_per_s(),
        optimizer_bytes_per_s=used.adam_bytes_per_s(),
        operator_s=used.operator_s(),
        layer_host_s=used.layer_host_s(),
        experts_host_s=used.experts_host_s(),
    )


def known_kind(device_name: str, product: str | None, memory_bytes: int | None) -> DeviceKind | None:
    """The kind of plan's table that a product is; None for others and for CPUs."""
    name = (product or "").replace(" ", "")
    if device_name == "npu" and "910_93" in name:
        return KINDS["A3"]
    if device_name == "npu" and "910B" in name:
        return KINDS["910B-64GB" if (memory_bytes or 0) > 40 * 2**30 else "910B-32GB"]
    named = [kind for kind in KINDS.values() if kind.device == "cuda" == device_name and kind.name in name]
    return named[0] if named and "GH200" not in name else None


def peak_flops(device_name: str, product: str | None, memory_bytes: int | None) -> float | None:
    """Peak of dense bf16 products by the data sheet, operations a second; None where it is not known."""
    kind = known_kind(device_name, product, memory_bytes)
    if kind is not None:
        return kind.bf16_flops
    found = [peak for part, peak in _OTHER_PEAKS.items() if device_name == "cuda" and part in (product or "")]
    return found[-1] if found else None


def device_kind(
    facts: Mapping[str, Any], rates: Mapping[str, Any], link: Mapping[str, Any] | None = None
) -> DeviceKind:
    """The record, from what was measured.

    Args:
        facts: Of the device, see :func:`scripts.device_report.conditions.run`.
        rates: The row of this section.
        link: Between devices of this host, measured; None where there is one device.
    """
    on_cpu = facts["device"] == "cpu"
    product = facts["device"], facts["product"], facts["memory_bytes"]
    nearest = known_kind(*product) or KINDS["910B-64GB" if facts["device"] == "npu" else "H100"]
    network = Link(latency_s=1e-3, bytes_per_s=1e9)
    inside, outside = (network, network) if on_cpu else (nearest.inside, nearest.outside)
    bf16, fp32, attention = rates["matmul_flops_bf16"], rates["matmul_flops_fp32"], rates["attention_flops"]
    used = fp32 if on_cpu else bf16
    peak = max(peak_flops(*product) or 0.0, used, attention)
    efficiency, layer = used / peak, rates["layer_host_s"]
    measured = "rates" if link is None else "rates and the links inside of a host"
    return DeviceKind(
        name=facts["product"] or "cpu",
        device=facts["device"],
        memory_bytes=facts["memory_bytes"] or facts["host_memory_bytes"],
        bf16_flops=bf16 / efficiency,
        fp32_flops=fp32 / efficiency,
        matmul_efficiency=efficiency,
        attention_efficiency=attention / peak,
        memory_bytes_per_s=rates["memory_bytes_per_s"],
        optimizer_bytes_per_s=rates["optimizer_bytes_per_s"],
        devices_per_host=facts["devices"] or facts["cores"],
        inside=link or inside,
        outside=outside,
        operator_s=rates["operator_s"],
        layer_host_s=layer,
        experts_host_s=rates["experts_host_s"],
        pass_host_s=2 * layer,
        step_host_s=10 * layer,
        cores=facts["cores"] if on_cpu else None,
        notes=f"Measured: {measured}. Links not measured are {'assumed' if on_cpu else 'those of ' + nearest.name}; "
        "host seconds of a pass and of a step are 2 and 10 times those of a layer, an assumption.",
    )
