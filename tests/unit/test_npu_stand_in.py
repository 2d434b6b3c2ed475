"""What the stand-in for torch_npu refuses: tables of inputs, and what the real operator says of each.

The checks of ``tests/fakes/torch_npu`` name the document or source file of each rule.
"""

import pytest
import torch

TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
ENDS = {"actual_seq_qlen": [2, 6], "actual_seq_kvlen": [2, 6]}
CAUSAL = {"atten_mask": TRIANGLE, "sparse_mode": 3}
HALF, DOUBLE = torch.float16, torch.float64


def call(torch_npu, layout, query, key=None, value=None, head_num=2, dtypes=3 * (torch.float32,), **options):
    """``npu_fusion_attention`` on random tensors of these shapes."""
    key = query if key is None else key
    shapes = (query, key, key if value is None else value)
    tensors = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    return torch_npu.npu_fusion_attention(*tensors, head_num, layout, **options)


ATTENTION = [
    # dtypes
    ("one dtype", "SBH", [(5, 1, 8)], {"dtypes": (DOUBLE, DOUBLE, DOUBLE)}),
    ("one dtype", "SBH", [(5, 1, 8)], {"dtypes": (HALF, HALF, torch.float32)}),
    # layouts and shapes
    ("input_layout BSH", "SHB", [(5, 1, 8)], {}),
    ("3 or 4 axes", "SBH", [(5, 8)], {}),
    ("3 axes for SBH", "SBH", [(5, 1, 2, 4)], {}),
    ("4 axes for BSND", "BSND", [(5, 1, 8)], {}),
    ("head_num above 0", "SBH", [(5, 1, 8)], {"head_num": 0}),
    ("a multiple of 3 heads", "SBH", [(5, 1, 8)], {"head_num": 3}),
    ("head_num 4 query heads", "BSND", [(1, 5, 2, 4)], {"head_num": 4}),
    ("multiple of the key heads", "BSND", [(1, 5, 2, 4), (1, 5, 3, 4)], {}),
    ("1 to 256 query heads", "BSND", [(1, 2, 257, 4)], {"head_num": 257}),
    ("one batch size", "BSND", [(1, 5, 2, 4), (2, 5, 2, 4)], {}),
    ("keys and values of one shape", "BSND", [(1, 5, 2, 4), (1, 5, 2, 4), (1, 6, 2, 4)], {}),
    ("Dq = Dk >= Dv", "BSND", [(1, 5, 2, 4), (1, 5, 2, 6)], {}),
    ("Dq = Dk >= Dv", "BSND", [(1, 5, 2, 4), (1, 5, 2, 4), (1, 5, 2, 8)], {}),
    ("head width of 1 to 768", "BSND", [(1, 2, 1, 770)], {"head_num": 1}),
    # options
    ("keep_prob", "SBH", [(5, 1, 8)], {"keep_prob": 0.0}),
    ("keep_prob", "SBH", [(5, 1, 8)], {"keep_prob": 1.5}),
    ("sparse_mode in", "SBH", [(5, 1, 8)], {"sparse_mode": 7}),
    ("sparse_mode in", "TND", [(6, 2, 4)], {"sparse_mode": 5, **ENDS}),
    ("softmax_layout", "SBH", [(5, 1, 8)], {"softmax_layout": "TND"}),
    # masks
    ("bool or uint8", "SBH", [(5, 1, 8)], {**CAUSAL, "atten_mask": TRIANGLE.float()}),
    ("compressed atten_mask", "SBH", [(5, 1, 8)], {**CAUSAL, "atten_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)}),
    ("compressed atten_mask", "SBH", [(5, 1, 8)], {**CAUSAL, "atten_mask": TRIANGLE[None, None]}),
    ("1 above the diagonal", "SBH", [(5, 1, 8)], {**CAUSAL, "atten_mask": ~TRIANGLE}),
    ("an atten_mask of", "SBH", [(5, 1, 8)], {"atten_mask": TRIANGLE}),
    ("an atten_mask of", "SBH", [(5, 1, 8)], {"atten_mask": torch.zeros(1, 5, 5, dtype=torch.bool)}),
    ("band that meets", "SBH", [(5, 1, 8)], {**CAUSAL, "sparse_mode": 4, "pre_tockens": -6, "next_tockens": 0}),
    # documents
    ("with TND", "TND", [(6, 2, 4)], {}),
    ("as many ends of keys", "TND", [(6, 2, 4)], {**ENDS, "actual_seq_kvlen": [6]}),
    ("running sums", "TND", [(6, 2, 4)], {**ENDS, "actual_seq_qlen": [6, 2]}),
    ("running sums", "TND", [(6, 2, 4)], {"actual_seq_qlen": [4, 0, 6], "actual_seq_kvlen": [4, 4, 6]}),
    ("ends within 6 tokens", "TND", [(6, 2, 4)], {**ENDS, "actual_seq_qlen": [2, 7]}),
    ("at most 2048 documents", "TND", [(3, 2, 4)], {key: [*(2048 * [1]), 3] for key in ENDS}),
    ("1 to 1 M tokens", "TND", [(1_000_001, 1, 1)], {"head_num": 1, **{key: [1_000_001] for key in ENDS}}),
    ("sparse_mode 3", "TND", [(6, 2, 4), (5, 2, 4)], {**CAUSAL, **ENDS, "actual_seq_kvlen": [2, 5]}),
    ("band of at least", "TND", [(6, 2, 4)], {**CAUSAL, **ENDS, "sparse_mode": 4, "pre_tockens": -1}),
    (
        "key for each query",
        "TND",
        [(6, 2, 4), (5, 2, 4)],
        {**CAUSAL, "actual_seq_qlen": [2, 6], "actual_seq_kvlen": [2, 5], "sparse_mode": 4, "next_tockens": 0},
    ),
]


@pytest.mark.parametrize(("words", "layout", "shapes", "options"), ATTENTION)
def test_attention_refuses(words, layout, shapes, options, torch_npu):
    with pytest.raises(RuntimeError, match=words):
        call(torch_npu, layout, *shapes, **options)


@pytest.mark.parametrize("ends", [torch.tensor([2, 6]), [torch.tensor(2), torch.tensor(6)], [2.0, 6.0]])
def test_ends_of_documents_are_numbers_on_the_host(ends, torch_npu):
    with pytest.raises(TypeError, match="ends of documents"):
        call(torch_npu, "TND", (6, 2, 4), actual_seq_qlen=ends, actual_seq_kvlen=[2, 6])


def test_without_a_mask_attention_is_full(torch_npu):
    query = torch.randn(1, 5, 2, 4)
    wanted = torch.nn.functional.scaled_dot_product_attention(*3 * (query.transpose(1, 2),), scale=1.0).transpose(1, 2)
    for options in ({}, {"sparse_mode": 2}, {"sparse_mode": 3}, {"pre_tockens": 0, "next_tockens": 0}):
        torch.testing.assert_close(torch_npu.npu_fusion_attention(*3 * (query,), 2, "BSND", **options)[0], wanted)


def test_outside_tnd_more_queries_than_keys_go_with_a_band_alone(torch_npu):
    with pytest.raises(NotImplementedError, match="query without a key"):
        call(torch_npu, "BSND", (1, 6, 2, 4), (1, 5, 2, 4), **CAUSAL)
    call(torch_npu, "BSND", (1, 6, 2, 4), (1, 5, 2, 4), **{**CAUSAL, "sparse_mode": 4}, next_tockens=1, pre_tockens=9)


def test_what_attention_returns(torch_npu):
    query = torch.randn(6, 2, 4)
    out, maximum, total, nothing, *numbers = torch_npu.npu_fusion_attention(*3 * (query,), 2, "TND", **CAUSAL, **ENDS)
    assert out.shape == query.shape
    assert maximum.shape == total.shape == (6, 2, 8)
    assert nothing.shape == (0,)
    assert numbers == [0, 0, 2 * (2 * 2 + 4 * 4)]
    ordered = torch_npu.npu_fusion_attention(*3 * (query,), 2, "TND", **CAUSAL, **ENDS, softmax_layout="TND")[1]
    assert torch.equal(maximum.view(2, 6, 8).transpose(0, 1), ordered), "the order of [N, T, 8] in memory"


def test_tokens_beyond_the_last_document_are_not_written(torch_npu):
    out = call(torch_npu, "TND", (7, 2, 4), **CAUSAL, actual_seq_qlen=[2, 6, 0], actual_seq_kvlen=[2, 6, 0])[0]
    assert out[6:].isnan().all()
    assert not out[:6].isnan().any()


def test_the_backward_of_documents_takes_a_width_of_512(torch_npu):
    for width in (512, 514):
        query = torch.randn(3, 1, width, requires_grad=True)
        ends = {"actual_seq_qlen": [3], "actual_seq_kvlen": [3]}
        out = torch_npu.npu_fusion_attention(*3 * (query,), 1, "TND", **CAUSAL, **ends)[0]
        if width <= 512:
            out.sum().backward()
            continue
        with pytest.raises(RuntimeError, match="at most 512"):
            out.sum().backward()


ROTATION = [
    # what, shape of the heads, shape of the angles, mode, whether the operator takes it
    ("SBND", (7, 3, 2, 6), (7, 1, 1, 6), "half", True),
    ("SBND", (7, 3, 2, 6), (7, 3, 1, 6), "half", True),
    ("SBND", (7, 3, 2, 6), (7, 3, 2, 6), "half", True),
    ("SBND", (7, 3, 2, 6), (7, 1, 1, 6), "interleave", True),
    ("angles of each row", (7, 3, 2, 6), (7, 3, 1, 6), "interleave", False),
    ("angles of each head", (7, 3, 2, 6), (7, 1, 2, 6), "interleave", False),
    ("BSND", (3, 7, 2, 6), (1, 7, 1, 6), "half", True),
    ("BSND", (3, 7, 2, 6), (1, 7, 1, 6), "interleave", True),
    ("BNSD", (3, 2, 7, 6), (1, 1, 7, 6), "half", True),
    ("BNSD, B1SD", (3, 2, 7, 6), (3, 1, 7, 6), "half", True),
    ("one angle for all", (7, 3, 2, 6), (1, 1, 1, 6), "half", False),
    ("angles of positions and heads", (3, 7, 2, 6), (1, 7, 2, 6), "half", False),
    ("TND", (7, 2, 6), (7, 1, 6), "half", True),
    ("TND", (7, 2, 6), (7, 1, 6), "interleave", True),
    ("2 axes", (7, 6), (7, 6), "half", False),
    ("5 axes", (1, 7, 3, 2, 6), (1, 7, 1, 1, 6), "half", False),
    ("angles of a part", (7, 3, 2, 6), (7, 1, 1, 4), "half", False),
    ("odd width", (7, 3, 2, 5), (7, 1, 1, 5), "half", False),
    ("width 894", (2, 1, 1, 894), (2, 1, 1, 894), "half", True),
    ("width 896", (2, 1, 1, 896), (2, 1, 1, 896), "half", False),
    ("999 rows", (2, 999, 1, 2), (2, 1, 1, 2), "half", True),
    ("1000 rows", (2, 1000, 1, 2), (2, 1, 1, 2), "half", False),
    ("1000 heads", (2, 1, 1000, 2), (2, 1, 1, 2), "half", False),
    ("999 rows by heads", (2, 333, 3, 2), (2, 1, 1, 2), "interleave", True),
    ("1000 rows by heads", (2, 250, 4, 2), (2, 1, 1, 2), "interleave", False),
    ("B N above 8 S, half a width of 32 bytes", (9, 2, 2, 16), (1, 1, 2, 16), "half", False),
]


@pytest.mark.parametrize(("what", "heads", "angles", "mode", "taken"), ROTATION)
def test_rotation(what, heads, angles, mode, taken, torch_npu):  # noqa: ARG001
    arguments = torch.randn(heads), torch.randn(angles), torch.randn(angles)
    if taken:
        assert torch_npu.npu_rotary_mul(*arguments, rotary_mode=mode).shape == heads
        return
    with pytest.raises(RuntimeError, match="npu_rotary_mul: expected"):
        torch_npu.npu_rotary_mul(*arguments, rotary_mode=mode)


def test_rotation_has_two_modes_and_casts_the_angles(torch_npu):
    heads, angles = torch.randn(7, 3, 2, 6).to(torch.bfloat16), torch.randn(7, 1, 1, 6)
    assert torch_npu.npu_rotary_mul(heads, angles, angles).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="half or interleave"):
        torch_npu.npu_rotary_mul(heads, angles, angles, rotary_mode="quarter")
    with pytest.raises(RuntimeError, match="fp16, bf16 or fp32"):
        torch_npu.npu_rotary_mul(heads.double(), angles, angles)
    with pytest.raises(RuntimeError, match="layout of mode"):  # the gradient of angles: B N up to 1024
        torch_npu.npu_rotary_mul(torch.randn(2, 500, 3, 2), *2 * (torch.randn(2, 1, 1, 2).requires_grad_(),))


@pytest.mark.parametrize(
    ("shape", "gamma", "dtypes", "taken"),
    [
        ((5, 6), (6,), (torch.bfloat16, torch.bfloat16), True),
        ((5, 6), (6,), (torch.bfloat16, torch.float32), True),
        ((2, 5, 6), (5, 6), (torch.float32, torch.float32), True),
        ((5, 6), (6,), (torch.float32, torch.bfloat16), False),
        ((5, 6), (6,), (torch.bfloat16, torch.float16), False),
        ((5, 6), (6,), (DOUBLE, DOUBLE), False),
        ((5, 6), (1,), (torch.float32, torch.float32), False),
        ((6,), (5, 6), (torch.float32, torch.float32), False),
        ((1, 1, 1, 1, 1, 1, 1, 5, 6), (6,), (torch.float32, torch.float32), False),
    ],
)
def test_norm(shape, gamma, dtypes, taken, torch_npu):
    hidden, weight = torch.randn(shape).to(dtypes[0]), torch.ones(gamma, dtype=dtypes[1])
    if not taken:
        with pytest.raises(RuntimeError, match="npu_rms_norm: expected"):
            torch_npu.npu_rms_norm(hidden, weight)
        return
    normed, scale = torch_npu.npu_rms_norm(hidden, weight)
    assert (normed.shape, normed.dtype) == (shape, dtypes[0])
    assert scale.dtype == torch.float32
    assert scale.shape == (*shape[: -len(gamma)], *len(gamma) * (1,))


@pytest.mark.parametrize(
    "gate_up",
    [
        torch.randn(5, 6).double(),
        torch.randn(5, 7),
        torch.randn(0, 6),
        torch.randn(6, 5).t(),
        torch.randn(5, 12)[:, ::2],
        torch.randn(1, 1, 1, 1, 1, 1, 1, 5, 6),
    ],
    ids=["fp64", "odd", "empty", "transposed", "strided", "nine axes"],
)
def test_swiglu_refuses(gate_up, torch_npu):
    with pytest.raises(RuntimeError, match="npu_swiglu: expected"):
        torch_npu.npu_swiglu(gate_up)
