"""What the report was made on: the device, versions, settings; and what scripts/ascend/env_report.sh prints."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from scripts.device_report.job import Job
from scripts.machine import processor, versions

_ENVIRONMENT = Path(__file__).parents[1] / "ascend" / "env_report.sh"


def run(job: Job) -> None:
    """One row."""
    device = job.open_device()
    row: dict[str, Any] = {
        "device": device.name,
        "product": device.product_name(),
        "devices": device.count(),
        "memory_bytes": device.memory_bytes(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": versions() | _of_device(device.name),
        "reduced_precision_products": torch.get_float32_matmul_precision(),
        "environment": environment(),
    }
    job.add(**row)


def environment() -> list[str]:
    """Lines of env_report.sh."""
    done = subprocess.run(["bash", str(_ENVIRONMENT)], capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.splitlines()


def _of_device(name: str) -> dict[str, str]:
    if name == "cuda":
        return {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    return {}
