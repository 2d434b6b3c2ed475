"""Causal attention of every device's kernel against the formula; the NPU's through a stand-in of the operator."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from mindspeed_simpo.device import npu
from mindspeed_simpo.model.causal import causal_attention

FAKES = Path(__file__).parent.parent / "fakes"


def dense(query, key, value, scale):
    """One head at a time, one query at a time."""
    queries, rows, heads, _ = query.shape
    keys, shared = key.shape[0], heads // key.shape[2]
    context = torch.zeros_like(query)
    for row in range(rows):
        for head in range(heads):
            for position in range(queries):
                seen = keys - queries + position + 1
                scores = scale * key[:seen, row, head // shared] @ query[position, row, head]
                context[position, row, head] = torch.softmax(scores, 0) @ value[:seen, row, head // shared]
    return context.flatten(2)


def problem(queries, keys, heads, groups):
    generator = torch.Generator().manual_seed(queries + keys)
    sizes = [(queries, 2, heads, 8), (keys, 2, groups, 8), (keys, 2, groups, 8)]
    return [torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True) for size in sizes]


@pytest.fixture
def torch_npu(monkeypatch):
    monkeypatch.syspath_prepend(str(FAKES))
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_npu"]:
        monkeypatch.delitem(sys.modules, name)
    module = importlib.import_module("torch_npu.attention")
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    return module


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (1, 6)])
@pytest.mark.parametrize("kernel", ["any device", "npu"])
def test_value_and_gradient(kernel, queries, keys, heads, groups, torch_npu):  # noqa: ARG001
    inputs = problem(queries, keys, heads, groups)
    attend = causal_attention if kernel == "any device" else npu.causal_attention
    context = attend(*inputs, 0.3)
    expected = dense(*inputs, 0.3)
    tolerance = (
        {"rtol": 1e-12, "atol": 1e-12} if kernel == "any device" else {"rtol": 1e-5, "atol": 1e-6}
    )  # fp32 inside
    torch.testing.assert_close(context, expected, **tolerance)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(context, inputs, upstream)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
