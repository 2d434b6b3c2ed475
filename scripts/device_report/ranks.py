"""Several ranks: a step of each layout against the oracle and its speed, and the rate of each collective by size."""

from __future__ import annotations

import dataclasses
import statistics
import traceback
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.device import Device
from mindspeed_simpo.studies.plan.calibration import link_of, time_collectives
from scripts.device_report.job import Job
from scripts.device_report.kernels import shape_of
from scripts.device_report.models import Form, Models, errors_of
from scripts.device_report.rates import device_kind, rates_of
from scripts.device_report.workload import Model, Work, seconds_of

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
SP, DO, EP = "sequence_parallel", "use_distributed_optimizer", "expert_model_parallel_size"
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "TP2 SP": {TP: 2, SP: True},
        "PP2": {PP: 2},
        "CP2": {CP: 2},
        "DP2 DO": {DO: True},
        "EP2": {EP: 2},
    },
    4: {"TP2 SP PP2": {TP: 2, SP: True, PP: 2}, "CP2 DP2 DO": {CP: 2, DO: True}},
    8: {"TP2 SP CP2 PP2": {TP: 2, SP: True, CP: 2, PP: 2}, "TP2 SP DP4 DO": {TP: 2, SP: True, DO: True}},
}
_PACKED = {"batching": "packed", "max_tokens_per_micro_batch": 60}


def run(job: Job) -> None:
    """Rows of the layouts of so many ranks; where each rank has a device of its own, also those of collectives."""
    device = job.open_device()
    backend = job.options.get("backend", device.backend)
    dist.init_process_group(backend)
    job.add(backend=backend, shared_device=bool(job.options.get("share_device")), ranks=job.ranks)
    # the first collective makes the communicators: a backend that takes no two ranks on one device says so here
    dist.all_reduce(torch.ones(8, device=device.torch_device))
    device.synchronize()
    control = dist.new_group(backend="gloo")
    models = Models(job.folder / f"ranks-{job.ranks}", small=job.small)
    for name, keys in LAYOUTS[job.ranks].items():
        if _all_have_time(job, name, control):
            _layout(job, device, models, name, keys)
    if not job.options.get("share_device") and _all_have_time(job, "collectives", control):
        _collectives(job, device)


def _all_have_time(job: Job, what: str, control: dist.ProcessGroup) -> bool:
    """As rank 0 has it, for all ranks must do the same."""
    found = [job.has_time_for(what) if job.rank == 0 else None]
    dist.broadcast_object_list(found, 0, group=control)
    return bool(found[0])


def _layout(job: Job, device: Device, models: Models, name: str, keys: dict[str, Any]) -> None:
    from megatron.core import parallel_state

    from mindspeed_simpo.parallel import initialize, seed_model_ranks

    family = "qwen3_moe" if EP in keys else "qwen2"
    form = Form(name, family, {**keys, **_PACKED})
    row = {"case": f"{name}, {job.ranks} ranks", "model": family, "dtype": "float32"}
    layout = _layout_of(keys, job.ranks)
    groups = initialize(layout, device)
    seed_model_ranks(1)
    try:
        for of, error, bound in errors_of(form, models, device, groups):
            job.add(**row, of=of, error=error, bound=bound, holds=error <= bound)
        job.add(layout=name, ranks=job.ranks, **_speed(job, device, groups, keys))
    except Exception:
        job.add(**row, crashed=traceback.format_exc()[-1500:], holds=False)
        raise  # the other ranks wait in a collective, and no later one could be trusted
    finally:
        parallel_state.destroy_model_parallel()


def _layout_of(keys: dict[str, Any], ranks: int) -> Layout:
    axes = {"tensor": keys.get(TP, 1), "pipeline": keys.get(PP, 1), "context": keys.get(CP, 1)}
    data = ranks // (axes["tensor"] * axes["pipeline"] * axes["context"])
    layout = Layout(**axes, data=data, sequence_parallel=keys.get(SP, False))
    return dataclasses.replace(layout, distributed_optimizer=keys.get(DO, False), expert=keys.get(EP, 1))


def _speed(job: Job, device: Device, groups: Any, keys: dict[str, Any]) -> dict[str, Any]:
    """Of a step with shared prompts."""
    shape = shape_of(job.small, experts=EP in keys)
    folder = job.folder / f"speed-{job.ranks}"
    if job.rank == 0:
        shape.write(folder)
    dist.barrier(groups.control)
    work = Work.drawn(shape.vocab, *((4, 24, 24, 128) if job.small else (32, 200, 200, 1024)))
    model = Model(folder, device, groups, work, **keys, batching="prefix_shared", max_tokens_per_micro_batch=4096)
    seconds = statistics.median(seconds_of(device, model.step(), 1 if job.small else 5, warm_ups=1))
    return {
        "seconds": seconds,
        "pairs_per_second": len(work.pairs) / seconds,
        "tokens_per_second": work.tokens / seconds,
    }


def _collectives(job: Job, device: Device) -> None:
    sizes = (64, 2**18) if job.small else (64, 2**14, 2**18, 2**22, 2**26)
    found = time_collectives(rates_of(job, device), sizes)
    for kind, times in found.items():
        for number, seconds in zip(sizes, times, strict=True):
            job.add(collective=kind, ranks=job.ranks, numbers=number, seconds=seconds, rate=4 * number / seconds)
    if job.options["rates"]:
        plain = device_kind(job.options["facts"], job.options["rates"])
        ends = {kind: [times[0], times[-1]] for kind, times in found.items()}
        job.add(link=link_of(plain, ends, job.ranks, (sizes[0], sizes[-1])).model_dump(), ranks=job.ranks)
