"""Defaults that depend on device and model: precision, the head's chunks, the form of micro-batches."""

from dataclasses import dataclass

import pytest

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.resolution import computation, resolve


@dataclass(frozen=True)
class Model:
    vocab_size: int = 32_000
    shares: bool = True
    layers: tuple = ()

    def shares_prefixes(self, _):
        return self.shares


def config(**values):
    return Config(model_name_or_path="model", data_path="pairs", **values)


@pytest.mark.parametrize(("device", "bf16", "chunk"), [("cpu", False, 512), ("cuda", True, 4096), ("npu", True, 4096)])
def test_precision_and_chunks_follow_the_device(device, bf16, chunk):
    resolved = resolve(config(), Model(), device)
    assert (resolved.bf16, resolved.logprob_chunk_tokens) == (bf16, chunk)
    assert (resolved.bf16_in_use, resolved.chunk_tokens_in_use) == (bf16, chunk)


@pytest.mark.parametrize("device", ["cpu", "cuda", "npu"])
@pytest.mark.parametrize("bf16", [False, True])
def test_values_that_are_given_are_kept(device, bf16):
    given = config(bf16=bf16, logprob_chunk_tokens=7, batching="prefix_shared")
    assert resolve(given, Model(shares=False), device) == given


def test_a_second_resolution_changes_nothing():
    once = resolve(config(), Model(), "npu")
    assert resolve(once, Model(), "cpu") == once


@pytest.mark.parametrize(
    ("device", "vocabulary", "tensor", "chunk"),
    [
        ("npu", 151_936, 1, 1664),
        ("npu", 151_936, 4, 4096),
        ("npu", 10**7, 1, 512),
        ("cuda", 151_936, 1, 3456),
        ("cuda", 151_936, 2, 4096),
    ],
)
def test_the_logits_of_a_chunk_fit_the_memory_that_is_set_aside(device, vocabulary, tensor, chunk):
    resolved = resolve(config(tensor_model_parallel_size=tensor), Model(vocabulary), device)
    assert resolved.logprob_chunk_tokens == chunk
    bytes_of_a_logit = 8 if device == "npu" else 4
    assert chunk == 512 or bytes_of_a_logit * chunk * vocabulary // tensor <= 2**31


@pytest.mark.parametrize(
    ("device", "given", "line"),
    [
        (
            "cuda",
            {},
            "device: cuda; precision: bf16 (default on cuda; bf16: false computes in fp32); output layer: "
            "chunks of 4096 tokens (default)",
        ),
        ("cpu", {"fused_logprob": False}, "device: cpu; precision: fp32 (default on cpu; bf16: true computes in bf16)"),
        (
            "npu",
            {"bf16": False, "logprob_chunk_tokens": 7},
            "device: npu; precision: fp32 (bf16: false); output layer: chunks of 7 tokens (logprob_chunk_tokens)",
        ),
    ],
)
def test_a_line_says_how_is_computed_and_why(device, given, line):
    before = config(**given)
    assert computation(before, resolve(before, Model(), device), device) == line


def test_the_model_decides_between_packed_and_shared_prefixes():
    assert resolve(config(), Model(shares=False), "cpu").batching == "packed"
    assert resolve(config(), Model(), "cpu").batching_in_use == "prefix_shared"
