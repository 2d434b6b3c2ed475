"""Attention of packed rows against a dense mask over the whole row, in fp64; every kernel that may serve it."""

import importlib

import pytest
import torch

from mindspeed_simpo.batch import Branch, Documents
from mindspeed_simpo.device import cuda, npu
from mindspeed_simpo.model import packed
from tests.unit.conftest import FAKES

DOCUMENTS = {
    "one": Documents((7,)),
    "several, one of one token": Documents((3, 1, 9)),
    "a branch of each": Documents((5, 6), (Branch(0, 3, 4), Branch(5, 2, 5))),
    "branches of one token": Documents((4, 2), (Branch(0, 3, 1), Branch(4, 1, 1))),
    "long prefix, padding between": Documents((12, 3), (Branch(0, 11, 2),)),
    "no prefix": Documents((2, 3), (Branch(0, 0, 4), Branch(2, 1, 3))),
}


def visible(documents, window=None):
    """True where the token of a row (first axis) sees the token of the same row (second axis)."""
    window = 10**6 if window is None else window
    spans = []
    start = 0
    for length in documents.wholes:
        spans.append((start, length, start, 0))
        start += length
    for branch in documents.branches:
        spans.append((start, branch.length, branch.prefix_start, branch.prefix_length))
        start += branch.length
    seen = torch.zeros(start, start, dtype=torch.bool)
    for first, length, prefix, prefix_length in spans:
        for token in range(first, first + length):
            seen[token, max(first, token + 1 - window) : token + 1] = True
            before = token - first + 1  # of its own document, itself included
            seen[token, prefix + max(0, prefix_length + before - window) : prefix + prefix_length] = True
    return seen


def dense(query, key, value, documents, scale, window=None, softcap=None, sinks=None):
    shared = query.shape[2] // key.shape[2]
    key, value = (tensor[:, 0].repeat_interleave(shared, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query[:, 0], key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(documents, window), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(query), 1)], dim=-1)
    weights = scores.softmax(-1)[..., : len(query)]
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)[:, None]


@pytest.fixture
def fakes(torch_npu, monkeypatch):  # noqa: ARG001
    monkeypatch.syspath_prepend(str(FAKES / "flash"))
    importlib.import_module("torch_varlen").install(monkeypatch)
    return monkeypatch


KERNELS = {
    "any device": None,
    "npu": npu.varlen_attention,
    "flash": cuda.flash_attention,
    "varlen": cuda.varlen_attention,
}


def random(length, heads, groups, width=8):
    sizes = (heads, groups, groups)
    return [torch.randn(length, 1, size, width, dtype=torch.float64, requires_grad=True) for size in sizes]


def compare(kernel, inputs, documents, *scores):
    """Value and gradients of ``inputs``: query, key, value and perhaps sinks."""
    dtype = torch.float32 if kernel == "npu" else torch.float64
    query, key, value, *sinks = (tensor.to(dtype) for tensor in inputs)
    context = packed.packed_attention(query, key, value, documents, *scores, *sinks)
    expected = dense(*inputs[:3], documents, *scores, *inputs[3:])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if kernel == "npu" else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(context.double(), expected, **tolerance)
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(context, inputs, upstream.to(dtype)), torch.autograd.grad(expected, inputs, upstream)
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (6, None), (None, 0.5), (4, 0.5)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_value_and_gradient(kernel, window, softcap, name, groups, fakes):
    capped = {} if kernel in ("npu", "varlen") else {"softcap": softcap}
    if softcap is not None and not capped:
        return  # no softcap: the NPU's is refused when the model is built, and PyTorch's never chosen
    variants = {"window": window, **capped}
    if KERNELS[kernel] is not None:
        fakes.setattr(packed, "varlen_attention", lambda *inputs: KERNELS[kernel](*inputs[:6], **variants))
    documents = DOCUMENTS[name]
    length = sum(documents.wholes) + sum(branch.length for branch in documents.branches)
    inputs = random(length, 4, groups)
    compare(kernel, inputs, documents, 0.3, window, softcap)


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kernel", ["any device", "npu"])
def test_sinks(kernel, window, name, fakes):
    if kernel == "npu":
        fakes.setattr(
            packed, "varlen_attention", lambda *inputs: npu.varlen_attention(*inputs[:6], window, sinks=inputs[8])
        )
    documents = DOCUMENTS[name]
    inputs = random(sum(documents.wholes) + sum(branch.length for branch in documents.branches), 4, 2)
    sinks = torch.tensor([-2.0, 0.3, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    compare(kernel, [*inputs, sinks], documents, 0.3, window, None)


def test_more_documents_than_one_call_of_an_npu_takes(fakes):  # noqa: ARG001
    lengths = (3, *2048 * (1,), 4)
    inputs = [torch.randn(sum(lengths), 1, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    context, expected = (
        attend(*inputs, lengths, lengths, 0.3) for attend in (npu.varlen_attention, packed.varlen_attention)
    )
    torch.testing.assert_close(context, expected)
    upstream = torch.randn_like(expected)
    grads = (torch.autograd.grad(each, inputs, upstream) for each in (context, expected))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_heads_of_any_width_before_key_value_heads_could_be_shared(fakes):
    """PyTorch 2.11 asks for as many key-value heads as query heads, and the kernel for a multiple of 8 elements."""
    stand_ins = importlib.import_module("torch_varlen")
    stand_ins.install(fakes, stand_ins.varlen_attn_2_11)
    fakes.setattr(packed, "varlen_attention", lambda *inputs: cuda.varlen_attention(*inputs[:6]))
    documents = DOCUMENTS["a branch of each"]
    compare("varlen", random(20, 4, 2, width=12), documents, 0.3)
