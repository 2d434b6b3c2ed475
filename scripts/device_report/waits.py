"""How often a training step makes the host wait for the device, and where."""

from __future__ import annotations

import collections
import traceback
from collections.abc import Callable
from typing import Any

from mindspeed_simpo.device import Device
from mindspeed_simpo.device.inspection import waits_of_host
from scripts.device_report.job import Job
from scripts.device_report.kernels import LEVERS, shape_of
from scripts.device_report.workload import Model, Work, open_world
from tests.ranks.waits import Waits

NOT_ON_CPU = (
    "the synchronisation debug mode belongs to accelerators and does not apply on the CPU; counted are the operators "
    "that would make the host wait for an accelerator"
)


def run(job: Job) -> None:
    """A row for each lever: all weights, adapters, experts."""
    device = job.open_device()
    groups = open_world(device)
    models = {"": (False, {}), ", adapters": (False, {"lora_r": 8}), ", experts": (True, {})}
    for kind, (experts, keys) in models.items():
        shape = shape_of(job.small, experts=experts)
        folder = shape.write(job.folder / f"waits-{experts}")
        work = Work.drawn(shape.vocab, 4, 30, 30, 128)
        model = Model(folder, device, groups, work, micro_batch_size=2, **keys)
        for name, lever in LEVERS.items() if not kind else (("prefix_shared", LEVERS["prefix_shared"]),):
            if job.has_time_for(f"{name}{kind}"):
                _row(job, device, f"{name}{kind}", model.step(**lever))


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
    with Waits() as seen:
        step()
    return collections.Counter(seen.seen)
