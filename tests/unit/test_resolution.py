"""Defaults that depend on device and model: precision, the head's chunks, the form of micro-batches."""

from dataclasses import dataclass

import pytest

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.resolution import resolve


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


@pytest.mark.parametrize(("vocabulary", "tensor", "chunk"), [(151_936, 1, 1664), (151_936, 4, 4096), (10**7, 1, 512)])
def test_the_logits_of_a_chunk_fit_a_gibibyte(vocabulary, tensor, chunk):
    resolved = resolve(config(tensor_model_parallel_size=tensor), Model(vocabulary), "npu")
    assert resolved.logprob_chunk_tokens == chunk
    assert chunk == 512 or 4 * chunk * vocabulary // tensor <= 2**30


def test_the_model_decides_between_packed_and_shared_prefixes():
    assert resolve(config(), Model(shares=False), "cpu").batching == "packed"
    assert resolve(config(), Model(), "cpu").batching_in_use == "prefix_shared"
