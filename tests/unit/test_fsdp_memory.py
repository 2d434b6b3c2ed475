"""Memory of a rank with ``backend: fsdp``."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from mindspeed_simpo.config.file import load_config
from mindspeed_simpo.model.fsdp.description import describe
from mindspeed_simpo.training.fsdp.memory import sharded_state

CONFIGS = Path(__file__).parents[2] / "configs"
SHAPES = {
    "qwen3_8b_lora_fsdp": (
        1,
        "qwen3",
        {"vocab_size": 151936, "intermediate_size": 12288, "num_hidden_layers": 36, "num_key_value_heads": 8},
    ),
    "olmo2_7b_simpo_fsdp": (
        8,
        "olmo2",
        {"vocab_size": 100352, "intermediate_size": 11008, "num_hidden_layers": 32, "num_key_value_heads": 32},
    ),
}
"""Ranks, and the shapes that the models' publishers give."""


def test_every_large_configuration_is_here():
    assert {path.stem for path in CONFIGS.glob("*_fsdp.yaml")} == SHAPES.keys()


@pytest.mark.parametrize("name", SHAPES)
def test_the_memory_that_a_configuration_names_is_what_check_counts(tmp_path, name):
    ranks, family, sizes = SHAPES[name]
    common = {"hidden_size": 4096, "num_attention_heads": 32, "tie_word_embeddings": False}
    CONFIG_MAPPING[family](**common, **sizes).save_pretrained(tmp_path)
    model, path = describe(str(tmp_path)), CONFIGS / f"{name}.yaml"
    run = load_config(path, {})
    state = sharded_state(model, run, ranks, run.global_batch_size // ranks)
    assert f"`check` counts {state.total / 2**30:.3g} GiB" in path.read_text()
    if run.lora_r:
        quantized = run.model_copy(update={"quantization": "nf4"})
        assert f"in 4 bits, {sharded_state(model, quantized, ranks, 32).total / 2**30:.2g}" in path.read_text()
