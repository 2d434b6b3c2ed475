"""The oracle's logits and gradients against transformers' own models in fp64, family by family."""

import json

import pytest
import torch

from tests import hf, oracle_model
from tests.oracle_model import FULL, SLIDING
from tests.tokenizers import FAMILIES, TOKENIZER_SIZE

WINDOW = 5
SCALINGS = ("llama3", "linear", "dynamic", "yarn", "longrope")
SHAPES = [
    *[(family, {}) for family in FAMILIES],
    ("qwen2", {"tied": True}),
    ("qwen3", {"head_dim": 32, "kv_heads": 1}),
    ("mistral", {"head_dim": 8, "layers": 1}),
    ("gemma2", {"tied": True, "head_dim": 8}),
    ("gemma3_text", {"tied": True, "head_dim": 32, "hidden": 48}),
    ("phi3", {"tied": True, "kv_heads": 4}),
    ("glm4", {"head_dim": 32, "kv_heads": 1}),
    # windows
    ("qwen2", {"window": WINDOW, "layers": 3}),
    ("qwen3", {"window": WINDOW, "layers": 3}),
    ("mistral", {"window": WINDOW}),
    ("phi3", {"window": WINDOW}),
    ("gemma2", {"window": WINDOW, "layers": 3, "hidden": 48}),
    ("gemma3_text", {"window": WINDOW, "layers": 3, "hidden": 48}),
    # rotations
    *[("llama", {"rope_scaling": scaling}) for scaling in SCALINGS],
    *[("gemma3_text", {"rope_scaling": scaling}) for scaling in ("linear", "yarn")],
    *[("glm4", {"rope_scaling": scaling}) for scaling in SCALINGS],
    ("glm4", {"partial": 0.75}),
    ("phi3", {"partial": 0.75}),
    ("phi3", {"rope_scaling": "longrope"}),
    ("phi3", {"rope_scaling": "longrope", "partial": 0.75, "window": WINDOW}),
    ("qwen2", {"rope_scaling": "yarn"}),
    ("qwen3", {"rope_scaling": "dynamic", "window": WINDOW}),
    ("mistral", {"rope_scaling": "linear", "window": WINDOW}),
    ("gemma2", {"rope_scaling": "yarn"}),
]


def as_version_4(config):
    """The rotary options and the types of the layers as transformers 4 wrote them."""
    config = dict(config)
    layer_types, rope = config.pop("layer_types", None), config.pop("rope_parameters")
    if config["model_type"] == "gemma3_text":
        config |= {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"], "sliding_window_pattern": 2}
        assert layer_types == [SLIDING if (layer + 1) % 2 else FULL for layer in range(config["num_hidden_layers"])]
        rope = rope["full_attention"]
    rope = dict(rope)
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    # Gemma 3 came after the key was renamed, and transformers 5 does not read the older one there
    rope["rope_type" if config["model_type"] == "gemma3_text" else "type"] = kind
    return config | {"rope_scaling": None if kind == "default" else rope}


def without(*names):
    return lambda config: {name: value for name, value in as_version_4(config).items() if name not in names}


def with_rope(**options):
    return lambda config: config | {"rope_parameters": config["rope_parameters"] | options}


def of_version_4_with_rope(**options):
    def change(config):
        config = as_version_4(config)
        return config | {"rope_scaling": config["rope_scaling"] | options}

    return change


LONGROPE, YARN = {"rope_scaling": "longrope"}, {"rope_scaling": "yarn"}
CONFIGS = [
    *[(family, {}, as_version_4) for family in FAMILIES],
    *[("llama", {"rope_scaling": scaling}, as_version_4) for scaling in SCALINGS],
    ("qwen2", {**YARN, "window": WINDOW, "layers": 3}, as_version_4),
    ("qwen3", {"window": WINDOW, "layers": 3}, as_version_4),
    ("qwen2", {}, lambda config: as_version_4(config) | {"sliding_window": WINDOW, "max_window_layers": 1}),
    ("mistral", {"window": WINDOW}, as_version_4),
    ("mistral", {}, without("sliding_window")),
    ("gemma2", {"layers": 3, "tied": True}, without("tie_word_embeddings", "rope_theta")),
    ("gemma2", {}, lambda config: config | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma2", {}, without("attn_logit_softcapping", "final_logit_softcapping")),
    ("gemma3_text", {"layers": 3, "rope_scaling": "linear"}, as_version_4),
    (
        "gemma3_text",
        {"layers": 7, "hidden": 32},
        without("rope_theta", "rope_local_base_freq", "sliding_window_pattern"),
    ),
    ("gemma3_text", {}, lambda config: config | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}),
    ("phi3", {**LONGROPE, "partial": 0.75, "window": WINDOW}, as_version_4),
    ("phi3", LONGROPE, of_version_4_with_rope(type="su")),
    ("phi3", LONGROPE, of_version_4_with_rope(original_max_position_embeddings=40)),
    ("glm4", {}, without("partial_rotary_factor")),
    ("llama", LONGROPE, with_rope(factor=9.0)),
    ("llama", LONGROPE, with_rope(attention_factor=1.5)),
    ("llama", LONGROPE, lambda config: config | {"max_position_embeddings": 16}),
    ("llama", YARN, with_rope(attention_factor=1.5)),
    ("llama", YARN, with_rope(mscale=0.7, mscale_all_dim=1.4)),
    ("llama", YARN, with_rope(beta_fast=3.0, beta_slow=0.2)),
    ("llama", YARN, with_rope(truncate=False)),
]
LENGTHS = {"longer than every context": 90, "shorter than every context": 12}


def assert_equals_transformers(folder, model, length):
    """Logits, and the gradient of a sum of log-probabilities, within 1e-9."""
    tokens = torch.randint(TOKENIZER_SIZE, (length,))
    params, config = oracle_model.load(folder)
    expected = model(tokens[None]).logits[0]
    actual = oracle_model.logits(params, config, tokens)
    assert expected.dtype == torch.float64
    assert expected.std() > 0.3
    assert (actual - expected).norm() < 1e-9 * expected.norm()
    prompt, response = tokens[: length // 3].tolist(), tokens[length // 3 :].tolist()
    total, count = oracle_model.sequence_logprob(params, config, prompt, response)
    assert count == len(response)
    model.zero_grad()
    expected.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, tokens[len(prompt) :, None]).sum().backward()
    grads = {name: param.grad for name, param in model.named_parameters()}
    assert params.keys() == grads.keys()
    for (name, param), grad in zip(params.items(), torch.autograd.grad(total, list(params.values())), strict=True):
        assert grads[name].shape == param.shape
        assert (grad - grads[name]).norm() < 1e-9 * grads[name].norm(), name


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("family", "shape"), SHAPES, ids=lambda part: part if isinstance(part, str) else str(part))
def test_logits_and_gradients_equal_transformers(tmp_path, in_fp64, family, shape, length):
    folder = hf.make_checkpoint(tmp_path, family, **shape)
    assert_equals_transformers(folder, in_fp64(folder), length)


@pytest.mark.parametrize(("family", "shape", "change"), CONFIGS)
def test_every_form_of_config_json_is_read_as_transformers_reads_it(tmp_path, in_fp64, family, shape, change):
    folder = hf.make_checkpoint(tmp_path, family, **shape)
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    assert_equals_transformers(folder, in_fp64(folder), 24)


def test_an_unknown_rotation_is_refused(tmp_path):
    params, config = oracle_model.load(hf.make_checkpoint(tmp_path, "llama", layers=1))
    with pytest.raises(ValueError, match="rope_type 'proportional'"):
        oracle_model.logits(params, with_rope(rope_type="proportional")(config), [1, 2, 3])
