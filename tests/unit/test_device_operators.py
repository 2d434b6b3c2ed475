"""The element-wise operators of the engine and of the NPU (through a stand-in), against their formulas."""

import sys
from functools import partial

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from mindspeed_simpo.device import npu, operators, reduction_dtype
from scripts.tensor_bytes import StoredBytes


@pytest.fixture(params=["own", "npu"])
def tolerance(request, monkeypatch):
    """Runs a test with either, in fp64 and fp32: the operators of NPUs take nothing wider."""
    if request.param == "own":
        return {"rtol": 1e-12, "atol": 1e-12}
    request.getfixturevalue("torch_npu")
    monkeypatch.setattr(npu, "is_on_npu", lambda _: True)
    return {"rtol": 1e-4, "atol": 1e-5}


def random(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True)


def compare(ours, formula, inputs, tolerance):
    """Values, and gradients of every input."""
    dtype = torch.float64 if tolerance["rtol"] < 1e-9 else torch.float32
    found, wanted = ours(*(tensor.to(dtype) for tensor in inputs)), formula(*inputs)
    torch.testing.assert_close(found.double(), wanted, **tolerance)
    upstream = torch.randn_like(wanted)
    grads = torch.autograd.grad(found, inputs, upstream.to(dtype)), torch.autograd.grad(wanted, inputs, upstream)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize(("offset", "rounds_last"), [(0.0, False), (1.0, False), (0.0, True)])
def test_rms_norm(offset, rounds_last, tolerance):
    def formula(hidden, weight):
        return torch.stack(
            [
                (offset + weight) * row / torch.sqrt(torch.dot(row, row) / len(row) + 1e-3)
                for row in hidden.flatten(0, 1)
            ]
        ).view_as(hidden)

    inputs = [random(5, 2, 6), random(6, seed=1)]
    norm = partial(operators.rms_norm, eps=1e-3, weight_offset=offset, rounds_last=rounds_last)
    compare(norm, formula, inputs, tolerance)


@pytest.mark.parametrize("biased", [False, True])
def test_swiglu(biased, tolerance):
    def formula(gate_up, bias=None):
        total = gate_up if bias is None else gate_up + bias
        gate, up = total[..., :3], total[..., 3:]
        return gate / (1 + torch.exp(-gate)) * up

    inputs = [random(5, 2, 6), *([random(6, seed=1)] if biased else [])]
    compare(operators.swiglu, formula, inputs, tolerance)


@pytest.mark.parametrize("biased", [False, True])
def test_geglu(biased, tolerance):
    def formula(gate_up, bias=None):
        total = gate_up if bias is None else gate_up + bias
        gate, up = total[..., :3], total[..., 3:]
        return 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up

    inputs = [random(5, 2, 6), *([random(6, seed=1)] if biased else [])]
    compare(operators.geglu, formula, inputs, tolerance)


def test_clamped_swiglu(tolerance):
    def formula(gate_up):
        gate, up = torch.minimum(gate_up[..., :3], torch.tensor(0.5)), torch.clip(gate_up[..., 3:], -0.5, 0.5)
        return gate / (1 + torch.exp(-1.7 * gate)) * (1 + up)

    compare(lambda gate_up: operators.clamped_swiglu(gate_up, 1.7, 0.5), formula, [random(5, 2, 6)], tolerance)


@pytest.mark.parametrize(("rows", "angles"), [(3, 1), (3, 3), (1001, 1), (1001, 1001)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rest", [0, 4])
def test_rotate(rows, angles, interleaved, rest, tolerance):
    positions = torch.arange(7)[:, None] * torch.arange(1, angles + 1)
    half = positions[..., None].double() * torch.tensor([1.0, 0.1, 0.01])
    angles = half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)
    cosines, sines = angles[:, :, None].cos(), angles[:, :, None].sin()

    def formula(heads):
        """Each pair of numbers as a complex one, times the unit of its angle; the rest as it is."""
        pairs = (heads[..., 0:6:2], heads[..., 1:6:2]) if interleaved else heads[..., :6].chunk(2, -1)
        turned = torch.complex(*pairs) * torch.polar(torch.ones_like(half), half)[:, :, None]
        both = turned.real, turned.imag
        joined = torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1)
        return torch.cat([joined, heads[..., 6:]], -1)

    def ours(heads):
        angles = (each.to(heads.dtype) for each in (cosines, sines))
        return operators.rotate(heads, *angles, interleaved=interleaved)

    compare(ours, formula, [random(7, rows, 2, 6 + rest)], tolerance)


def test_a_norm_of_stored_differences_in_bfloat16_is_that_of_transformers_bit_by_bit():
    norm = Gemma2RMSNorm(48, eps=1e-6).to(torch.bfloat16)
    torch.nn.init.normal_(norm.weight, std=0.3)
    hidden = torch.randn(9, 2, 48).to(torch.bfloat16).requires_grad_()
    found, wanted = operators.rms_norm(hidden, norm.weight, 1e-6, 1.0), norm(hidden)
    assert torch.equal(found, wanted)
    upstream = torch.randn_like(wanted)
    for a, b in zip(
        *(torch.autograd.grad(value, (hidden, norm.weight), upstream) for value in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("transformers_norm", "rounds_last"), [(Qwen2RMSNorm, False), (GptOssRMSNorm, True)])
def test_a_norm_in_bfloat16_is_that_of_transformers_bit_by_bit(transformers_norm, rounds_last):
    norm = transformers_norm(48, eps=1e-6).to(torch.bfloat16)
    torch.nn.init.normal_(norm.weight, mean=1.0)
    hidden = torch.randn(9, 2, 48).to(torch.bfloat16).requires_grad_()
    found, wanted = operators.rms_norm(hidden, norm.weight, 1e-6, rounds_last=rounds_last), norm(hidden)
    assert torch.equal(found, wanted)
    upstream = torch.randn_like(wanted)
    for a, b in zip(
        *(torch.autograd.grad(value, (hidden, norm.weight), upstream) for value in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_what_is_kept_for_the_backward():
    tokens, hidden, ffn = 64, 32, 80
    weight = torch.ones(hidden, requires_grad=True)
    vectors, gate_up = (torch.randn(tokens, size, requires_grad=True) for size in (hidden, 2 * ffn))
    heads, angles = torch.randn(tokens, 1, 4, 8, requires_grad=True), torch.randn(tokens, 1, 1, 8)
    for call, numbers in (
        (lambda: operators.rms_norm(vectors, weight, 1e-6), tokens * (hidden + 1)),
        (lambda: operators.swiglu(gate_up), tokens * 2 * ffn),
        (lambda: operators.geglu(gate_up), tokens * 2 * ffn),
        (lambda: operators.clamped_swiglu(gate_up, 1.7, 7.0), tokens * 2 * ffn),
        (lambda: operators.rotate(heads, angles.cos(), angles.sin()), tokens * 2 * 8),
    ):
        with StoredBytes([weight]) as stored:
            kept = call()
        assert stored.peak == 4 * numbers
        del kept


def test_sums_are_narrow_where_mindspeed_reduces_them(monkeypatch):
    cpu = torch.device("cpu")
    assert reduction_dtype(cpu) == torch.float64
    monkeypatch.setitem(sys.modules, "mindspeed", object())
    assert reduction_dtype(cpu) == torch.float32
