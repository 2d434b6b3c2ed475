"""The choice of the attention kernel, and FlexAttention as it is called on GPUs: its masks, values and gradients."""

import logging

import pytest
import torch
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask

from mindspeed_simpo.batch import Branch, Documents
from mindspeed_simpo.device import cuda
from mindspeed_simpo.device.cuda import Platform, platform_of
from mindspeed_simpo.model import blockwise, causal, kernels, packed, visible
from mindspeed_simpo.model.flex_check import check_flex_attention
from mindspeed_simpo.model.kernels import Scores, attention_kernel, sentence
from mindspeed_simpo.parallel.context import positions_of
from tests.unit.test_model_packed import DOCUMENTS, compare, random
from tests.unit.test_model_packed import visible as seen_by_token

# torch.compile hides this warning of its own, and cannot where warnings are errors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

H200 = {"triton": True, "capability": (9, 0)}
GPUS = {
    "H200": Platform("cuda", (2, 11), **H200),
    "H200 with flash-attn": Platform("cuda", (2, 11), flash_attn=True, **H200),
    "torch 2.10": Platform("cuda", (2, 10), **H200),
    "no Triton": Platform("cuda", (2, 13), **H200 | {"triton": False}),
    "RTX 4090": Platform("cuda", (2, 13), triton=True, capability=(8, 9)),
    "V100": Platform("cuda", (2, 11), flash_attn=True, triton=True, capability=(7, 0)),
}
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
CHOICES = [
    # platform, dtype, width of a head, more than a causal mask, kernel of packed rows, kernel of other rows
    ("H200", BF16, 128, (), "varlen_attn", "scaled_dot_product_attention"),
    ("H200", torch.float16, 96, ("window",), "varlen_attn", "flex_attention"),
    ("H200", BF16, 128, ("softcap",), "flex_attention", "flex_attention"),
    ("H200", BF16, 64, ("sinks", "window"), "flex_attention", "flex_attention"),
    ("H200", FP32, 192, (), "flex_attention", "scaled_dot_product_attention"),
    ("H200", FP32, 192, ("window",), "flex_attention", "flex_attention"),
    ("H200", FP64, 128, (), "per_document", "scaled_dot_product_attention"),
    ("H200", FP32, 512, ("softcap",), "per_document", "blockwise_attention"),
    ("H200", BF16, 512, (), "per_document", "scaled_dot_product_attention"),
    ("H200 with flash-attn", BF16, 128, ("softcap",), "flash_attn", "flex_attention"),
    ("H200 with flash-attn", BF16, 128, ("sinks",), "flex_attention", "flex_attention"),
    ("H200 with flash-attn", FP32, 128, (), "flex_attention", "scaled_dot_product_attention"),
    ("torch 2.10", BF16, 128, (), "per_document", "scaled_dot_product_attention"),
    ("torch 2.10", FP32, 128, ("window",), "per_document", "blockwise_attention"),
    ("no Triton", BF16, 128, ("window",), "varlen_attn", "blockwise_attention"),
    ("no Triton", FP32, 128, (), "per_document", "scaled_dot_product_attention"),
    ("RTX 4090", BF16, 128, (), "varlen_attn", "scaled_dot_product_attention"),
    ("RTX 4090", FP32, 128, ("softcap",), "flex_attention", "flex_attention"),
    ("V100", torch.float16, 128, (), "per_document", "scaled_dot_product_attention"),
]


@pytest.mark.parametrize(("gpu", "dtype", "width", "variants", "of_packed", "of_others"), CHOICES)
def test_the_table(gpu, dtype, width, variants, of_packed, of_others):
    variants = dict.fromkeys(variants, True)
    for is_packed, expected in ((True, of_packed), (False, of_others)):
        scores = Scores(dtype, width, is_packed, **variants)
        assert attention_kernel(GPUS[gpu], scores) == expected
        slow = expected in ("per_document", "blockwise_attention")
        assert ("PyTorch 2.11 (found" in sentence(GPUS[gpu], scores)) == slow


@pytest.mark.parametrize("variants", [{}, {"window": True}, {"softcap": True}, {"sinks": True}])
def test_other_devices(variants):
    for scores in (Scores(BF16, 128, packed=True, **variants), Scores(BF16, 128, packed=False, **variants)):
        assert attention_kernel(Platform("npu", (2, 7)), scores) == "npu_fusion_attention"
        expected = "per_document" if scores.packed else "blockwise_attention" if variants else None
        on_cpu = attention_kernel(platform_of(torch.device("cpu")), scores)
        assert on_cpu == (expected or "scaled_dot_product_attention")


@pytest.fixture
def gpu(monkeypatch):
    """CPU tensors are computed as those of an H200, FlexAttention by its own formulas in place of Triton's kernels."""
    compilations = []

    def backend(graph, _):
        compilations.append(graph)
        return graph.forward

    def compiled(function):
        return torch.compile(function, fullgraph=True, backend=backend)

    caches = (kernels._said, kernels._flex_works, kernels.attention_kernel, cuda._attend)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(cuda, "_compiled", compiled)
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)  # it refuses gradients on CPUs
    monkeypatch.setattr(kernels, "platform_of", lambda _: GPUS["H200"])
    # of fp64, which these tests compute in, the choice is that of fp32
    monkeypatch.setattr(kernels, "_flex", lambda platform, scores: platform.triton and scores.dtype == FP64)
    table = [(name, kernels._flex if name == "flex_attention" else serves) for name, serves in kernels.KERNELS]
    monkeypatch.setattr(kernels, "KERNELS", tuple(table))
    yield compilations
    for cached in caches:
        cached.cache_clear()


SINKS = torch.tensor([-2.0, 0.3, 1.0, 3.0], dtype=FP64, requires_grad=True)
LONG = {
    "blocks seen in whole": Documents((270, 150), (Branch(0, 260, 20), Branch(0, 262, 3), Branch(270, 149, 140))),
    "whole blocks of queries": Documents((256, 128)),
}


@pytest.mark.parametrize(("softcap", "sinks", "groups"), [(None, None, 2), (0.5, None, 2), (None, SINKS, 4)])
def test_rows_in_one_call_of_flex_attention(gpu, monkeypatch, softcap, sinks, groups):
    monkeypatch.setattr(packed, "varlen_attention", None)
    monkeypatch.setattr(kernels, "check_flex_attention", lambda *_, **__: None)
    rows = [(each, window) for each in DOCUMENTS.values() for window in (None, 3)]
    for documents, window in [*rows, *((each, 140) for each in LONG.values())]:
        inputs = random(sum(documents.lengths), 4, groups)
        compare("flex", inputs + ([] if sinks is None else [sinks]), documents, 0.3, window, softcap)
    # of one block of queries, of several, and of any number
    assert len(gpu) <= 3


@pytest.mark.parametrize(("window", "softcap", "sinks"), [(None, 0.5, None), (4, None, SINKS)])
def test_rows_of_one_document(gpu, monkeypatch, window, softcap, sinks):
    monkeypatch.setattr(causal, "blockwise_attention", None)
    monkeypatch.setattr(kernels, "check_flex_attention", lambda *_, **__: None)
    for queries, keys in ((3, 7), (140, 300)):
        sizes = [(queries, 2, 4, 12), (keys, 2, 2, 12), (keys, 2, 2, 12)]
        inputs = [torch.randn(size, dtype=FP64, requires_grad=True) for size in sizes]
        more = [] if sinks is None else [sinks]
        context = causal.causal_attention(*inputs, 0.3, window, softcap, *more)
        expected = blockwise.blockwise_attention(*inputs, 0.3, window, softcap, *more)
        torch.testing.assert_close(context, expected)
        upstream = torch.randn_like(expected)
        ours, theirs = (torch.autograd.grad(each, inputs + more, upstream) for each in (context, expected))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)
    assert gpu


def test_context_parallel_ranks(gpu, monkeypatch):
    monkeypatch.setattr(kernels, "check_flex_attention", lambda *_, **__: None)
    size = 2
    documents = LONG["blocks seen in whole"]
    documents = documents.with_padding(-sum(documents.lengths) % (2 * size))
    row = random(sum(documents.lengths), 4, 2)
    held = [positions_of(rank, size, documents.lengths, torch.device("cpu")) for rank in range(size)]
    order = torch.cat(held)
    query, key, value = row
    parts = [
        packed.segmented_attention(query[own], key[order], value[order], documents, rank, size, 0.3, 100)
        for rank, own in enumerate(held)
    ]
    assert gpu
    with monkeypatch.context() as on_cpu:
        on_cpu.setattr(packed, "_takes_masks", lambda *_: False)
        on_cpu.setattr(packed, "chosen_kernel", lambda *_, **__: "per_document")
        on_cpu.setattr(causal, "chosen_kernel", lambda *_, **__: "blockwise_attention")
        expected = packed.packed_attention(*row, documents, 0.3, 100)[order]
    torch.testing.assert_close(torch.cat(parts), expected)
    upstream = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(each, row, upstream) for each in (torch.cat(parts), expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("window", [None, 1, 140])
@pytest.mark.parametrize("name", LONG)
def test_blocks_are_those_that_pytorch_finds_by_a_dense_mask(name, window):
    """Each block of queries sees a block of keys in part, in whole or not at all; the kernels read these lists."""
    for size in (1, 2):
        documents = LONG[name].with_padding(-sum(LONG[name].lengths) % (2 * size))
        total, dense = sum(documents.lengths), seen_by_token(documents, window)
        for rank in range(size):
            rows = dense[positions_of(rank, size, documents.lengths, torch.device("cpu"))]
            mask = visible.row_mask(documents, rank, size, window, torch.device("cpu"))
            expected = create_block_mask(
                lambda _, __, query, key, rows=rows: rows[query, key], None, None, len(rows), total, device="cpu"
            )
            assert mask.shape == expected.shape
            assert torch.equal(flex.create_mask(mask.mask_mod, 1, 1, len(rows), total, device="cpu")[0, 0], rows)
            assert torch.equal(mask.to_dense(), expected.to_dense())
            for kind in ("kv", "q"):
                assert lists(mask, kind) == lists(expected, kind)
                partial, full = lists(mask, kind), lists(mask, f"full_{kind}")
                better = lists(expected, f"full_{kind}")
                assert all(set(found) <= set(known) for found, known in zip(full, better, strict=True)), (partial, full)


def lists(mask, kind):
    """The blocks of each row."""
    numbers, indices = getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")
    return [index[:number] for number, index in zip(numbers[0, 0].tolist(), indices[0, 0].tolist(), strict=True)]


@pytest.fixture
def log(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("mindspeed_simpo"), "propagate", True)
    caplog.set_level(logging.INFO, "mindspeed_simpo")
    return caplog


def test_flex_attention_is_checked_and_each_choice_logged_once(gpu, log):
    inputs, documents = random(13, 4, 2), DOCUMENTS["several, one of one token"]
    for _ in range(2):
        packed.packed_attention(*inputs, documents, 0.3)
    assert [each.getMessage() for each in log.records] == [
        "attention of packed rows (float64, heads of 8): flex_attention"
    ]
    assert len(gpu) == 2  # of the check and of the row


@pytest.mark.parametrize("fails", ["by an error", "by other numbers"])
@pytest.mark.usefixtures("gpu")
def test_flex_attention_that_fails_is_not_used(log, monkeypatch, fails):
    def attention(*_):
        raise ValueError("No valid triton configs\nmore")

    def wrong(*inputs):
        context, lse = right(*inputs)
        return context * 1.001, lse

    right = cuda._attend(8**-0.5, 2.0, False, (True, 2, 1, 16, FP64, True))
    monkeypatch.setattr(cuda, "_attend", lambda *_: attention if fails == "by an error" else wrong)
    context = packed.packed_attention(*random(13, 4, 2), Documents((3, 10)), 0.3, None, 0.5)
    assert context.shape == (13, 1, 32)
    warning, choice, of_documents = (each.getMessage() for each in log.records)
    assert ("ValueError: No valid triton configs)" if fails == "by an error" else "0e-03 off") in warning
    assert choice.startswith("attention of packed rows (float64, heads of 8, softcap): per_document, the slow way")
    assert of_documents.startswith(
        "attention of rows of one document (float64, heads of 8, softcap): blockwise_attention"
    )


def test_the_check_knows_softcaps_and_sinks(gpu):
    for variant in ({"softcap": True, "sinks": False}, {"softcap": False, "sinks": True}):
        check_flex_attention(torch.device("cpu"), FP64, 12, **variant)
    assert len(gpu) == 2


def test_cpus_are_silent(log):
    packed.packed_attention(*random(13, 4, 2), DOCUMENTS["several, one of one token"], 0.3)
    assert not log.records
