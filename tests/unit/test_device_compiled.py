"""Formulas that are compiled to one kernel compute what they compute operator by operator, here by the CPU's compiler."""

import shutil
import threading

import pytest
import torch

from mindspeed_simpo.device import compiled, operators

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
    # the compiler of torch 2.13 calls what torch 2.13 deprecates
    pytest.mark.filterwarnings(r"ignore:`torch\.jit:DeprecationWarning"),
]


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(compiled, "DEVICE_TYPES", {"cpu"})
    monkeypatch.setattr(compiled, "_failed", set())
    torch._dynamo.reset()


def random(*size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(dtype).requires_grad_()


def rotated(heads, angles, interleaved):
    return operators.rotate(heads, angles.cos(), angles.sin(), interleaved=interleaved)


def results(tokens, dtype):
    """Values and gradients of every operator."""
    hidden, weight = random(tokens, 2, 6, dtype=dtype), random(6, dtype=dtype, seed=1)
    halves, heads = random(tokens, 2, 12, dtype=dtype, seed=2), random(tokens, 2, 3, 8, dtype=dtype, seed=3)
    angles = random(tokens, 1, 1, 4, dtype=dtype, seed=4).detach()
    outputs = [
        (operators.rms_norm(hidden, weight, 1e-6), (hidden, weight)),
        (operators.rms_norm(hidden, weight, 1e-5, 1.0), (hidden, weight)),
        (operators.swiglu(halves), (halves,)),
        (operators.geglu(halves), (halves,)),
        (operators.clamped_swiglu(halves, 1.7, 0.7), (halves,)),
        (rotated(heads, angles, False), (heads,)),
        (rotated(heads, angles, True), (heads,)),
    ]
    found = []
    for output, inputs in outputs:
        upstream = torch.linspace(-1, 1, output.numel()).view(output.shape).to(dtype)
        found += [output, *torch.autograd.grad(output, inputs, upstream)]
    return found


def test_values_and_gradients_are_the_same(on_cpu, monkeypatch):
    compiled_results = {
        (tokens, dtype): results(tokens, dtype) for tokens in (5, 9) for dtype in (torch.float32, torch.bfloat16)
    }
    assert not compiled._failed
    monkeypatch.setattr(compiled, "DEVICE_TYPES", set())
    for (tokens, dtype), found in compiled_results.items():
        tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
        for ours, wanted in zip(found, results(tokens, dtype), strict=True):
            assert ours.dtype == wanted.dtype
            torch.testing.assert_close(ours, wanted, **tolerance)
