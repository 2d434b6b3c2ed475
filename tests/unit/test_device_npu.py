"""The NPU's operators, as the engine calls them, against their documented formulas; a stand-in computes them."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from mindspeed_simpo.device import npu, reduction_dtype

FAKES = Path(__file__).parent.parent / "fakes"


@pytest.fixture(autouse=True)
def _torch_npu(monkeypatch):
    monkeypatch.syspath_prepend(str(FAKES))
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_npu"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_npu", importlib.import_module("torch_npu.operators"))


def random(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True)


def compare(ours, formula, inputs):
    """Values, and gradients of every input."""
    found, wanted = ours(*inputs), formula(*inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # fp32 inside
    upstream = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(value, inputs, upstream) for value in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_rms_norm():
    def formula(hidden, weight):
        return torch.stack(
            [weight * row / torch.sqrt(torch.dot(row, row) / len(row) + 1e-3) for row in hidden.flatten(0, 1)]
        ).view_as(hidden)

    compare(lambda *inputs: npu.rms_norm(*inputs, 1e-3), formula, [random(5, 2, 6), random(6, seed=1)])


@pytest.mark.parametrize("biased", [False, True])
def test_swiglu(biased):
    def formula(gate_up, bias=None):
        total = gate_up if bias is None else gate_up + bias
        gate, up = total[..., :3], total[..., 3:]
        return gate / (1 + torch.exp(-gate)) * up

    inputs = [random(5, 2, 6), *([random(6, seed=1)] if biased else [])]
    # megatron-core's MLP gives the bias, or None, and flags
    compare(lambda gate_up, bias=None: npu.swiglu(gate_up, bias, False), formula, inputs)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotate(rows, interleaved):
    positions = torch.arange(7)[:, None] * torch.arange(1, rows + 1)
    half = positions[..., None].double() * torch.tensor([1.0, 0.1, 0.01])
    angles = half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)

    def formula(heads):
        """Each pair of numbers as a complex one, times the unit of its angle."""
        if interleaved:
            first, second = heads[..., ::2], heads[..., 1::2]
        else:
            first, second = heads.chunk(2, -1)
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(half), half)[:, :, None]
        parts = [turned.real, turned.imag]
        return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)

    def ours(heads):
        return npu.rotate(heads, angles[:, :, None, :], interleaved, multi_latent_attention=False, mscale=1.0)

    compare(ours, formula, [random(7, 3, 2, 6)])


def test_sums_are_narrow_where_mindspeed_reduces_them(monkeypatch):
    cpu = torch.device("cpu")
    assert reduction_dtype(cpu) == torch.float64
    monkeypatch.setitem(sys.modules, "mindspeed", object())
    assert reduction_dtype(cpu) == torch.float32
