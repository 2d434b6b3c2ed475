"""The most memory of training steps: of the allocator on an accelerator, counted tensors on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindspeed_simpo.device import Device
from mindspeed_simpo.training.memory import MemoryEstimate
from scripts.device_report.workload import Model
from scripts.tensor_bytes import PeakBytes, StoredBytes


def compared(device: Device, model: Model, step: Callable[[], None], expected: MemoryEstimate) -> dict[str, Any]:
    """Bytes of a step and of the estimate, buffers of collectives left out of both; and their ratio.

    Args:
        device: The device of the model.
        model: Has run a step before, so that the optimizer has its state.
        step: The step.
        expected: The estimate of the step.
    """
    bytes_expected = expected.total - expected.communication
    if device.is_cpu:
        measured = _counted(model, step)
    else:
        device.release_memory()
        device.reset_peak_memory()
        step()
        device.synchronize()
        measured = device.peak_memory_bytes()
    return {"peak_bytes": measured, "expected_bytes": bytes_expected, "expected_over_peak": bytes_expected / measured}


def _counted(model: Model, step: Callable[[], None]) -> int:
    parameters = [parameter for each in model.wrapped for parameter in each.parameters()]
    gradients = [parameter.main_grad for parameter in parameters if parameter.requires_grad]
    lasting = [*parameters, *gradients, *_optimizer_tensors(model)]
    with StoredBytes(parameters) as stored, PeakBytes(lasting) as made:
        step()
    return sum(tensor.numel() * tensor.element_size() for tensor in lasting) + max(stored.peak, made.peak)


def _optimizer_tensors(model: Model) -> list[Any]:
    """Adam's moments, and the fp32 parameters of a model in bf16."""
    optimizer = model.stepper.optimizer
    found = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in part.optimizer.state.values():
            found += [state["exp_avg"], state["exp_avg_sq"]]
        for group in getattr(part, "fp32_from_float16_groups", []):
            found += group
    return found
