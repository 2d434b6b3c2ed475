"""Adapters by peft with ``backend: fsdp``: loss and gradients of both factors, on linear layers and on experts."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import hf_adapters, oracle_adapters
from tests.hf import make_checkpoint, make_token_pairs
from tests.oracle_objectives import Options
from tests.ranks.fsdp_models import VOCABULARY, by_transformers, check_step, fsdp_steps, make_adapter, make_model

pytestmark = pytest.mark.newest_core
PAIRS = make_token_pairs(8, VOCABULARY)


@pytest.mark.parametrize("ranks", [1, 2])
def test_linear_layers(tmp_path, ranks):
    base = make_model(tmp_path / "model", "llama")
    keys = make_adapter(tmp_path / "adapter", base, ["q_proj", "down_proj"])
    expected = by_transformers(base, PAIRS, Options(), tmp_path / "adapter")
    for form in ("padded", "prefix_shared"):
        found = fsdp_steps(base, [PAIRS], ranks, batching=form, **keys)
        assert found["grads"].keys() == expected[1].keys()
        check_step(found, expected)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts(tmp_path, family, ranks):
    base = make_model(tmp_path / "model", family)
    keys = make_adapter(tmp_path / "adapter", base, ["q_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    expected = by_transformers(base, PAIRS, Options(), tmp_path / "adapter")
    for options in (
        {"batching": "prefix_shared"},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ):
        found = fsdp_steps(base, [PAIRS], ranks, **options, **keys)
        assert found["grads"].keys() == expected[1].keys()
        check_step(found, expected)


def test_experts_have_no_dropout(tmp_path):
    base = make_model(tmp_path / "model", "mixtral")
    with pytest.raises(AssertionError, match="does not work with lora_dropout"):
        fsdp_steps(base, [PAIRS], lora_r=2, lora_dropout=0.1, lora_target_modules=["gate_up_proj"])


FORMS = {
    "padded": {"batching": "padded"},
    "prefix_shared": {"batching": "prefix_shared"},
    "split, recomputed": {
        "pair_schedule": "split",
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "two_pass, packed": {"pair_schedule": "two_pass", "batching": "packed"},
    "context": {"batching": "prefix_shared", "context_parallel_size": 2},
}


@pytest.mark.parametrize("form", FORMS)
def test_dropout_has_the_masks_of_the_other_backend(tmp_path, form):
    base = make_checkpoint(tmp_path / "model", "qwen3", vocab_size=VOCABULARY)
    modules = ["q_proj", "o_proj", "gate_proj"]
    adapter = hf_adapters.make_adapter(tmp_path / "adapter", base, modules)
    loss, _, grads, _ = oracle_adapters.train_step(base, adapter, PAIRS, 0.0, Options(), dropout=0.3, seed=5)
    keys = {"lora_r": 4, "lora_alpha": 8, "lora_target_modules": modules, "lora_load": str(adapter)}
    found = fsdp_steps(base, [PAIRS], 2, lora_dropout=0.3, seed=5, **FORMS[form], **keys)
    named = {f"base_model.model.{name}".replace(".weight", ".default.weight"): grad for name, grad in grads.items()}
    check_step(found, (loss, named))


def dequantized_model(folder, base):
    """Write the model with the values that its linear layers have in 4 bits."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear) and name != "lm_head":
            values, state = quantize_4bit(part.weight.data, quant_type="nf4")
            part.weight.data = dequantize_4bit(values, state)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_in_4_bits(tmp_path, ranks):
    base = make_model(tmp_path / "model", "qwen3")
    keys = make_adapter(tmp_path / "adapter", base, ["q_proj", "down_proj"])
    same = dequantized_model(tmp_path / "same", base)
    expected = by_transformers(same, PAIRS, Options(), tmp_path / "adapter")
    assert abs(expected[0] - by_transformers(base, PAIRS, Options(), tmp_path / "adapter")[0]) > 1e-3
    for options in ({"batching": "padded"}, {"batching": "prefix_shared", "stage": "simpo"}):
        check_step(fsdp_steps(base, [PAIRS], ranks, quantization="nf4", **options, **keys), expected)
