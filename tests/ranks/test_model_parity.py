"""The engine's model against transformers': logits and every gradient, in fp32."""

import numpy as np
import pytest

from tests.ranks.launcher import run_ranks
from tests.ranks.model_helpers import (
    EP,
    ETP,
    LLAMA3_ROPE,
    YARN,
    make_checkpoint,
    run_engine,
    transformers_result,
    whole_logits,
)

pytestmark = pytest.mark.newest_core

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0 + 0.05 * index for index in range(8)],
    "long_factor": [1.0 + 0.5 * index for index in range(8)],
}
WIDE = {"hidden_size": 112}
MODELS = {
    "llama-gqa": {"family": "llama"},
    "llama-mha-tied": {"family": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama-llama3-rope": {"family": "llama", "rope_parameters": LLAMA3_ROPE},
    "llama-linear-rope": {
        "family": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 2000.0},
    },
    "llama-biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral-gqa": {"family": "mistral", "sliding_window": None},
    "mistral-mha-wide-heads": {
        "family": "mistral",
        "num_key_value_heads": 4,
        "head_dim": 24,
        "sliding_window": 64,
    },
    "mistral-tied": {"family": "mistral", "tie_word_embeddings": True, "sliding_window": None},
    "qwen2-gqa": {"family": "qwen2"},
    "qwen2-mqa-tied": {"family": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen2-mha": {"family": "qwen2", "num_key_value_heads": 4},
    "qwen3-gqa": {"family": "qwen3"},
    "qwen3-mha-tied": {"family": "qwen3", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3-biases": {"family": "qwen3", "attention_bias": True},
    "qwen3-window": {
        "family": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen2-window": {"family": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "mistral-window": {"family": "mistral", "sliding_window": 6},
    "llama-yarn": {
        "family": "llama",
        "rope_parameters": YARN | {"beta_fast": 4.0, "beta_slow": 1.5, "truncate": False},
    },
    "qwen2-yarn": {"family": "qwen2", "rope_parameters": YARN},
    "llama-yarn-mscale": {"family": "llama", "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.4}},
    "llama-dynamic": {
        "family": "llama",
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1000.0},
    },
    "gemma2": {"family": "gemma2"},
    "gemma2-untied-without-caps": {
        "family": "gemma2",
        "tie_word_embeddings": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "gemma3": {"family": "gemma3_text"},
    "gemma3-scaled": {
        "family": "gemma3_text",
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "final_logit_softcapping": 3.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 20000.0},
        },
    },
    "phi3": {"family": "phi3", "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}},
    "phi3-window": {"family": "phi3", "sliding_window": 11, "tie_word_embeddings": True},
    "phi3-long": {"family": "phi3", "original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
    "phi3-short": {"family": "phi3", "original_max_position_embeddings": 32, "rope_parameters": LONGROPE},
    "glm4": {"family": "glm4"},
    "glm4-without-biases": {"family": "glm4", "attention_bias": False, "head_dim": 24},
    "qwen3_moe": {"family": "qwen3_moe"},
    "qwen3_moe-dense-layers": {
        "family": "qwen3_moe",
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "norm_topk_prob": False,
    },
    "qwen3_moe-window": {"family": "qwen3_moe", "use_sliding_window": True, "sliding_window": 5},
    "mixtral": {"family": "mixtral"},
    "mixtral-window": {"family": "mixtral", "sliding_window": 6},
    "glm4_moe": {"family": "glm4_moe"},
    "glm4_moe-plain": {"family": "glm4_moe", "use_qk_norm": False, "norm_topk_prob": False, "n_shared_experts": 1},
    "deepseek_v3": {"family": "deepseek_v3"},
    "deepseek_v3-plain": {
        "family": "deepseek_v3",
        "q_lora_rank": None,
        "attention_bias": False,
        "rope_interleave": False,
        "v_head_dim": 24,
        "n_group": 1,
        "topk_group": 1,
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.4},
    },
    "gpt_oss": {"family": "gpt_oss"},
    "gpt_oss-without-biases": {"family": "gpt_oss", "attention_bias": False, "swiglu_alpha": 1.2},
    "gpt_oss-7-heads": {"family": "gpt_oss", "num_attention_heads": 7, "num_key_value_heads": 1},
    "llama-7-heads": {"family": "llama", "num_attention_heads": 7, "num_key_value_heads": 1} | WIDE,
    "qwen2-14-heads": {"family": "qwen2", "num_attention_heads": 14, "num_key_value_heads": 2} | WIDE,
    "qwen3-6-heads": {"family": "qwen3", "num_attention_heads": 6, "num_key_value_heads": 1, "attention_bias": True},
}
LAYOUTS = [
    ("llama-biases", (2, 1, 1)),
    ("qwen2-gqa", (2, 1, 1)),
    ("qwen3-gqa", (2, 1, 1)),
    ("qwen3-mha-tied", (2, 1, 1)),
    ("mistral-mha-wide-heads", (4, 1, 1)),
    ("llama-llama3-rope", (1, 2, 1)),
    ("qwen2-mqa-tied", (1, 2, 1)),
    ("qwen3-mha-tied", (2, 2, 1)),
    ("qwen2-gqa", (2, 2, 1)),
    ("llama-gqa", (1, 1, 2)),
    ("gemma2", (2, 1, 1)),
    ("gemma2", (1, 2, 1)),
    ("gemma3", (2, 2, 1)),
    ("phi3", (2, 1, 1)),
    ("phi3-window", (1, 2, 1)),
    ("glm4", (2, 1, 1)),
    ("glm4", (1, 2, 1)),
    ("qwen2-window", (2, 2, 1)),
    # more ranks than key-value heads; heads that the ranks do not divide
    ("llama-7-heads", (2, 1, 1)),
    ("qwen2-14-heads", (4, 1, 1)),
    ("qwen3-6-heads", (4, 1, 1)),
    ("glm4", (4, 1, 1)),
    ("gpt_oss-7-heads", (2, 1, 1)),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            options = dict(MODELS[name])
            folder = make_checkpoint(tmp_path_factory.mktemp(name), options.pop("family"), **options)
            made[name] = folder, *transformers_result(folder)
        return made[name]

    return make


def _assert_equal(results, logits, gradients):
    ours = whole_logits(results)
    vocab_size = logits.shape[-1]
    np.testing.assert_allclose(ours[..., :vocab_size], logits, rtol=0, atol=2e-5)
    assert np.all(np.isneginf(ours[..., vocab_size:]))
    assert results[0][1].keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = np.linalg.norm(results[0][1][name] - gradient) / np.linalg.norm(gradient)
        assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_transformers(checkpoint, name):
    folder, logits, gradients = checkpoint(name)
    assert np.abs(logits).max() > 0.5
    _assert_equal(run_ranks(run_engine, 1, folder, (1, 1, 1)), logits, gradients)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_layout_gives_the_same_with_a_vocabulary_it_does_not_divide(checkpoint, name, layout):
    folder, logits, gradients = checkpoint(name)
    results = run_ranks(run_engine, np.prod(layout), folder, layout)
    if layout[2] > 1:
        results = [results[0], *[(None, {}) for _ in results[1:]]]
    _assert_equal(results, logits, gradients)
    assert not any(gradients for _, gradients in results[1:])


EXPERT_LAYOUTS = [
    ("qwen3_moe", (2, 1, 1), {}),
    ("qwen3_moe", (1, 1, 2), {EP: 2}),
    ("mixtral", (2, 1, 1), {EP: 2, ETP: 1, "sequence_parallel": True}),
    ("glm4_moe", (1, 2, 2), {ETP: 2}),
    ("deepseek_v3", (2, 1, 1), {EP: 2, ETP: 1, "sequence_parallel": True}),
    ("deepseek_v3-plain", (2, 2, 1), {}),
    ("gpt_oss", (2, 2, 1), {"sequence_parallel": True}),
    ("gpt_oss", (4, 1, 1), {EP: 4, ETP: 1}),
    ("gpt_oss", (1, 1, 2), {ETP: 2}),
]


@pytest.mark.parametrize(("name", "layout", "options"), EXPERT_LAYOUTS)
def test_experts_divided_over_ranks(checkpoint, name, layout, options):
    folder, logits, gradients = checkpoint(name)
    results = run_ranks(run_engine, np.prod(layout), folder, layout, **options)
    if layout[2] > 1:  # data-parallel ranks have the same logits
        last = next(logits for logits, _ in results if logits is not None)
        results = [(last, results[0][1])]
    _assert_equal(results, logits, gradients)


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        {"recompute_granularity": "selective"},
    ],
)
def test_recomputation_changes_nothing(checkpoint, recompute):
    folder, logits, gradients = checkpoint("qwen3-gqa")
    _assert_equal(run_ranks(run_engine, 2, folder, (2, 1, 1), **recompute), logits, gradients)


def test_a_shard_that_is_all_padding_is_possible(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen2", vocab_size=5, num_key_value_heads=4)
    _assert_equal(run_ranks(run_engine, 4, folder, (4, 1, 1)), *transformers_result(folder))


def test_bfloat16_stays_near_float32(checkpoint):
    folder, logits, gradients = checkpoint("qwen3-gqa")
    results = run_ranks(run_engine, 2, folder, (2, 1, 1), bf16=True)
    ours = whole_logits(results)[..., : logits.shape[-1]]
    assert np.abs(ours - logits).max() < 0.05 * np.abs(logits).max()
    for name, gradient in gradients.items():
        error = np.linalg.norm(results[0][1][name] - gradient) / np.linalg.norm(gradient)
        assert error < 0.1, f"{name}: {error}"
