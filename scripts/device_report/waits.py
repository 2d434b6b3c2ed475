"""How often a training step makes the host wait for the device, and where."""

from __future__ import annotations

import collections
import traceback
from collections.abc import Callable
from typing import Any

from mindspeed_simpo.device import Device
from mindspeed_simpo.device.inspection import waits_of_host
from scripts.device_report.job import Job
from scripts.device_report.kernels import models_and_levers
from scripts.device_report.workload import open_world
from tests.ranks.waits import Waits

NOT_ON_CPU = (
    "the synchronisation debug mode belongs to accelerators and does not apply on the CPU; counted are the operators "
    "that would make the host wait for an accelerator"
)


def run(job: Job) -> None:
    """A row for each lever."""
    device = job.open_device()
    for model, name, keys in models_and_levers(job, device, open_world(device)):
        _row(job, device, name, model.step(**keys))


def _row(job: Job, device: Device, lever: str, step: Callable[[], None]) -> None:
    try:
        step()
        places = _counted(device, step)
    except Exception:
        job.add(lever=lever, crashed=traceback.format_exc()[-1500:])
        return
    row: dict[str, Any] = {"lever": lever, "waits": sum(places.values()), "places": dict(places.most_common(10))}
    if device.is_cpu:
        row["method"] = NOT_ON_CPU
    job.add(**row)


def _counted(device: Device, step: Callable[[], None]) -> collections.Counter[str]:
    if not device.is_cpu:
        with waits_of_host(device) as found:
            step()
        device.synchronize()
        return found.places
    with Waits(on_host="shards") as seen:  # response tokens are searched in host memory
        step()
    return collections.Counter(seen.seen)
