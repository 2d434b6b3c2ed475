"""Causal attention of every device's kernel against the formula; the NPU's through a stand-in of the operator."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from mindspeed_simpo.device import npu
from mindspeed_simpo.model import blockwise
from mindspeed_simpo.model.causal import causal_attention
from scripts.tensor_bytes import PeakBytes, StoredBytes


def dense(query, key, value, *sinks, scale, window=None, softcap=None):
    """One head at a time, one query at a time."""
    queries, rows, heads, _ = query.shape
    keys, shared = key.shape[0], heads // key.shape[2]
    context = torch.zeros_like(query)
    for row in range(rows):
        for head in range(heads):
            for position in range(queries):
                end = keys - queries + position + 1
                seen = slice(0 if window is None else max(0, end - window), end)
                scores = scale * key[seen, row, head // shared] @ query[position, row, head]
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = torch.softmax(torch.cat([scores, *(each[head, None] for each in sinks)]), 0)[: len(scores)]
                context[position, row, head] = weights @ value[seen, row, head // shared]
    return context.flatten(2)


def problem(queries, keys, heads, groups):
    generator = torch.Generator().manual_seed(queries + keys)
    sizes = [(queries, 2, heads, 8), (keys, 2, groups, 8), (keys, 2, groups, 8)]
    return [torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True) for size in sizes]


def compare(attend, inputs, tolerance, dtype=torch.float64, **variants):
    query, key, value, *sinks = (tensor.to(dtype) for tensor in inputs)
    more = {"sinks": sinks[0]} if sinks else {}
    context = attend(query, key, value, 0.3, **variants, **more)
    expected = dense(*inputs, scale=0.3, **variants)
    torch.testing.assert_close(context.double(), expected, **tolerance)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(context, inputs, upstream.to(dtype))
    theirs = torch.autograd.grad(expected, inputs, upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


TOLERANCES = {"any device": {"rtol": 1e-12, "atol": 1e-12}, "npu": {"rtol": 1e-4, "atol": 1e-5}}
DTYPES = {"any device": torch.float64, "npu": torch.float32}


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (1, 6)])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("kernel", TOLERANCES)
def test_value_and_gradient(kernel, window, queries, keys, heads, groups, torch_npu):  # noqa: ARG001
    attend = causal_attention if kernel == "any device" else npu.causal_attention
    compare(attend, problem(queries, keys, heads, groups), TOLERANCES[kernel], DTYPES[kernel], window=window)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7)])
@pytest.mark.parametrize("window", [None, 3])
def test_a_soft_cap(window, queries, keys, heads, groups):
    inputs = problem(queries, keys, heads, groups)
    compare(causal_attention, inputs, TOLERANCES["any device"], window=window, softcap=0.5)


SINKS = torch.tensor([-2.0, 0.3, 1.0, 3.0], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7)])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("kernel", TOLERANCES)
def test_sinks(kernel, window, queries, keys, groups, torch_npu):  # noqa: ARG001
    attend = causal_attention if kernel == "any device" else npu.causal_attention
    inputs = [*problem(queries, keys, 4, groups), SINKS]
    compare(attend, inputs, TOLERANCES[kernel], DTYPES[kernel], window=window)


@pytest.mark.parametrize("window", [None, 3, 5])
def test_sinks_in_several_blocks_of_queries(monkeypatch, window):
    monkeypatch.setattr(blockwise, "_SMALLEST_BLOCK", 4)
    compare(causal_attention, [*problem(9, 17, 4, 2), SINKS], TOLERANCES["any device"], window=window)


def test_sinks_beyond_all_scores_leave_nothing(torch_npu):  # noqa: ARG001
    query, key, value = (tensor.float() for tensor in problem(3, 5, 4, 2))
    for attend in (causal_attention, npu.causal_attention):
        assert torch.all(attend(query, key, value, 0.3, sinks=torch.full((4,), 300.0)) == 0)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_a_sink_is_not_rounded_to_bfloat16(scale):
    """A key alone, with a score of zero: its weight is the sigmoid of minus the sink."""
    query, value = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16), torch.ones(1, 1, 1, 8, dtype=torch.bfloat16)
    sinks = torch.tensor([3.3333333])
    found = causal_attention(query, query, value, scale, sinks=sinks)
    assert torch.equal(found[0, 0, 0], torch.sigmoid(-sinks)[0].bfloat16())


@pytest.mark.parametrize(("window", "softcap"), [(None, 0.5), (2, None), (3, 0.5), (5, None), (9, None)])
@pytest.mark.parametrize(("queries", "keys"), [(13, 13), (9, 17), (8, 8)])
def test_several_blocks_of_queries(monkeypatch, window, softcap, queries, keys):
    monkeypatch.setattr(blockwise, "_SMALLEST_BLOCK", 4)
    monkeypatch.setattr(blockwise, "_LARGEST_BLOCK", 6)
    inputs = problem(queries, keys, 2, 1)
    compare(causal_attention, inputs, TOLERANCES["any device"], window=window, softcap=softcap)


def test_blocks_keep_their_inputs_alone_and_see_no_whole_row():
    query, key, value = (torch.randn(3000, 1, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    with PeakBytes([query, key, value]) as made:
        with StoredBytes([query, key, value]) as stored:
            context = causal_attention(query, key, value, 1.0, window=200)
        context.sum().backward()
    assert stored.peak == 0, "the inputs are the caller's"
    assert made.peak < 4 * 3000 * 1000, "scores of the whole row would be nine times as many"


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="torch with CUDA asks for a GPU also for tensors without storage",
)
@pytest.mark.parametrize(("dtype", "shared"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)])
def test_gpus_share_key_value_heads_only_where_a_kernel_without_dense_scores_does(dtype, shared):
    calls = []

    class Calls(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.scaled_dot_product_attention:
                calls.append((args[1].shape[1], kwargs["enable_gqa"]))
            return func(*args, **(kwargs or {}))

    # tensors without storage: no GPU is needed to see which kernels the call admits
    with FakeTensorMode(), Calls():
        query, key = (torch.empty(16, 1, heads, 8, device="cuda", dtype=dtype) for heads in (4, 2))
        causal_attention(query, key, key, 0.3)
    assert calls == [(2, True) if shared else (4, False)]
