"""Every operator: value and each gradient on the device, in fp32 and bf16, against its formula in fp64 on the host."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mindspeed_simpo.device import Device
from scripts.device_report.job import Job

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}
"""Largest relative L2 error of a value and of a gradient. fp32: sums of 2,048 numbers in one order are off by about
``2^-24 sqrt(2048) = 3e-6``, products in TF32, whose numbers have 11 bits, by 3e-4. bf16: four roundings of ``2^-8``,
for inputs are exact and sums are in fp32."""


@dataclass(frozen=True)
class Case:
    """An operator with inputs."""

    name: str
    inputs: dict[str, Tensor]
    """fp64 on the host; rounded to the dtype under test first, so that both sides get the same numbers. Every one has a
    gradient."""
    run: Callable[..., Tensor]
    """The operator; gets inputs and constants by name."""
    reference: Callable[..., Tensor]
    """The formula, written plainly; gets the same in fp64."""
    constants: dict[str, Tensor] = field(default_factory=dict)
    """As ``inputs``, without gradients; whole numbers and truth values keep their dtype."""
    refused_on: tuple[str, ...] = ()
    """Devices on which a model that needs this is refused when it is built."""


def run(job: Job) -> None:
    """Rows of all cases in both dtypes."""
    device = job.open_device()
    from scripts.device_report import attention_cases, exact_cases, head_cases, operator_cases

    cases = [*operator_cases.cases(job.small), *attention_cases.cases(job.small), *head_cases.cases(job.small, device)]
    for case in cases:
        for dtype in BOUNDS:
            if job.has_time_for(case.name):
                compare(job, device, case, dtype)
    for name, check in exact_cases.CHECKS.items():
        if job.has_time_for(name):
            add_row(job, name, *check(device))


def compare(job: Job, device: Device, case: Case, dtype: torch.dtype) -> None:
    """Add the rows of one case, or one row that says why there are none."""
    named = str(dtype).removeprefix("torch.")
    if device.name in case.refused_on:
        job.add(case=case.name, dtype=named, refused=f"a model that needs this is refused on {device.name}")
        return
    try:
        errors = errors_of(device, case, dtype)
    except Exception:
        job.add(case=case.name, dtype=named, crashed=traceback.format_exc()[-1500:], holds=False)
        return
    for of, error in errors.items():
        add_row(job, case.name, named, of, error, BOUNDS[dtype])


def add_row(job: Job, case: str, dtype: str, of: str, error: float, bound: float) -> None:
    """A number that is not a number holds nothing."""
    job.add(case=case, dtype=dtype, of=of, error=error, bound=bound, holds=error <= bound)


def errors_of(device: Device, case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Relative L2 errors of the value, and of the gradient of each input."""
    inputs = {name: tensor.to(dtype) for name, tensor in case.inputs.items()}
    constants = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in case.constants.items()
    }
    exact = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in constants.items()}
    expected = case.reference(**exact, **wide)
    here = {name: tensor.to(device.torch_device).requires_grad_() for name, tensor in inputs.items()}
    value = case.run(**here, **{name: tensor.to(device.torch_device) for name, tensor in constants.items()})
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(value.shape, generator=generator).to(value.dtype)
    found = torch.autograd.grad(value, list(here.values()), upstream.to(device.torch_device))
    wanted = torch.autograd.grad(expected, list(exact.values()), upstream.double())
    errors = {"value": relative_error(value, expected)}
    for name, grad, exact_grad in zip(inputs, found, wanted, strict=True):
        errors[f"gradient of {name}"] = relative_error(grad, exact_grad)
    return errors


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``|found - expected| / |expected|``, L2."""
    distance = (found.detach().cpu().double() - expected.detach()).norm()
    return float(distance / expected.detach().norm())


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    """fp64 random numbers on the host."""
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
