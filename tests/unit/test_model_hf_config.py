"""config.json -> a description: both of transformers' layouts, and everything that is refused."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.errors import ConfigError, ModelError
from mindspeed_simpo.model.description import Rotation
from mindspeed_simpo.model.folder import resolve_model
from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.model.naming import pipeline_chunks
from mindspeed_simpo.model.rotary import inverse_frequencies, rotation_tables
from tests.hf import make_checkpoint

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _write(folder, **changes):
    raw = {key: value for key, value in (BASE | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return str(folder)


def _config(folder, **options):
    return Config(model_name_or_path=str(folder), data_path="unused", **options)


def _as(model_type, architecture, **changes):
    return {"model_type": model_type, "architectures": [architecture], **changes}


MISTRAL, QWEN2 = _as("mistral", "MistralForCausalLM"), _as("qwen2", "Qwen2ForCausalLM")
QWEN3, PHI3 = _as("qwen3", "Qwen3ForCausalLM"), _as("phi3", "Phi3ForCausalLM", pad_token_id=0)
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 64}
GEMMA2, GEMMA3 = _as("gemma2", "Gemma2ForCausalLM", **GEMMA), _as("gemma3_text", "Gemma3ForCausalLM", **GEMMA)
GLM4 = _as("glm4", "Glm4ForCausalLM", pad_token_id=0)


def _layers(folder, **changes):
    return read_description(_write(folder, **changes)).layers


def test_llama_fields(tmp_path):
    model = read_description(_write(tmp_path, attention_bias=True, mlp_bias=True, head_dim=32))
    assert (model.family, model.architecture, model.num_layers) == ("llama", "LlamaForCausalLM", 4)
    assert (model.tied, model.dtype, model.logit_softcap, model.embedding_scale) == (False, "bfloat16", None, 1.0)
    for layer in model.layers:
        attention = layer.attention
        assert (attention.heads, attention.kv_heads, attention.head_dim, attention.scale) == (4, 2, 32, 32**-0.5)
        assert (attention.qkv_bias, attention.o_bias, layer.mlp.bias, attention.qk_norm) == (True, True, True, None)
        assert (layer.norm_before_mlp.eps, attention.rotation.theta, attention.rotation.dims) == (1e-5, 10000.0, 32)
    assert [model.padded_vocab_size(ranks) for ranks in (1, 2, 4)] == [131, 132, 132]


def test_family_variants(tmp_path):
    for changes, expected in ((QWEN2, (True, False)), (QWEN3, (False, True)), (MISTRAL, (False, False))):
        attention = _layers(tmp_path, **changes)[0].attention
        assert (attention.qkv_bias, attention.qk_norm is not None, attention.o_bias) == (*expected, False)


def test_windows_by_layer(tmp_path):
    def windows(**changes):
        return [layer.attention.window for layer in _layers(tmp_path, **changes)]

    assert windows(**MISTRAL) == [4096] * 4, "transformers' default"
    assert windows(**MISTRAL, sliding_window=None) == [None] * 4
    assert windows(**PHI3, sliding_window=9) == [9] * 4
    window = {"sliding_window": 128, "max_window_layers": 3}
    assert windows(**QWEN2, **window, use_sliding_window=False) == [None] * 4
    assert windows(**QWEN2, **window, use_sliding_window=True) == [None, None, None, 128]
    types = ["sliding_attention", "full_attention"] * 2
    assert windows(**QWEN3, **window, use_sliding_window=True, layer_types=types) == [128, None] * 2
    assert windows(**GEMMA2) == [8, None] * 2
    assert windows(**GEMMA3) == [8] * 4, "five with a window, then one without"
    assert windows(**GEMMA3, sliding_window_pattern=2) == [8, None] * 2


def test_gemma(tmp_path):
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    model = read_description(_write(tmp_path, **GEMMA2, **caps))
    layer = model.layers[0]
    assert (layer.attention.scale, layer.attention.softcap, model.logit_softcap) == (64**-0.5, 50.0, 30.0)
    assert (layer.norm_after_mlp.weight_offset, layer.mlp.activation, model.embedding_scale) == (1.0, "gelu_tanh", 8.0)
    scaled = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    local, everywhere = (each.attention.rotation for each in _layers(tmp_path, **GEMMA3, **scaled)[:6:3])
    types = {"sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}
    types["full_attention"] = {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}
    old = read_description(_write(tmp_path, **GEMMA3, **scaled, sliding_window_pattern=2))
    new = read_description(_write(tmp_path, **GEMMA3, rope_parameters=types, sliding_window_pattern=2))
    assert old == new
    local, everywhere = new.rotations
    assert (local.kind, local.theta, everywhere.kind, everywhere.theta) == ("default", 1e4, "linear", 1e6)


def test_glm4_turns_neighbours_of_half_a_head(tmp_path):
    attention = _layers(tmp_path, **GLM4, head_dim=32)[0].attention
    assert (attention.rotation.dims, attention.rotation.interleaved, attention.qkv_bias) == (16, True, True)


@pytest.mark.parametrize("name", ["default", "linear", "llama3"])
def test_both_layouts_of_the_rotary_settings_are_read_alike(tmp_path, name):
    settings = {"default": {}, "linear": {"factor": 2.0}, "llama3": LLAMA3}[name]
    old = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": name, **settings} if settings else None}
    new = {"rope_parameters": {"rope_type": name, "rope_theta": 500000.0, **settings}}
    before = read_description(_write(tmp_path, **old))
    after = read_description(_write(tmp_path, **new))
    assert before == after
    (rotation,) = after.rotations
    assert (rotation.kind, rotation.theta) == (name, 500000.0)


def test_the_oldest_layout_names_the_kind_type(tmp_path):
    assert read_description(_write(tmp_path, rope_scaling={"type": "linear", "factor": 4.0})).rotations[0].factor == 4.0


SCALINGS = {
    "linear": {"factor": 2.5},
    "llama3": LLAMA3,
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, not truncated": {"factor": 4.0, "original_max_position_embeddings": 128, "truncate": False, "beta_slow": 2},
    "yarn, own attention factor": {"factor": 8.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
    "dynamic": {"factor": 3.0},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "short_factor": [1.0 + index / 10 for index in range(32)],
        "long_factor": [1.0 + index for index in range(32)],
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_inverse_frequencies_equal_transformers(tmp_path, name):
    kind = name.split(",")[0]
    folder = _write(tmp_path, head_dim=64, rope_theta=10000.0, rope_scaling={"rope_type": kind, **SCALINGS[name]})
    (rotation,) = read_description(folder).rotations
    config = AutoConfig.from_pretrained(folder)
    if not rotation.depends_on_length:
        expected, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        torch.testing.assert_close(inverse_frequencies(rotation), expected, rtol=1e-6, atol=0)
        assert rotation.attention_factor == pytest.approx(scale, abs=1e-12)
        return
    lengths = torch.tensor([7, 128, 129, 512, 513, 900])
    for length, ours in zip(lengths, inverse_frequencies(rotation, lengths), strict=True):
        expected, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=0)
        assert rotation.attention_factor == pytest.approx(scale, abs=1e-12)


def test_who_may_share_a_prompt(tmp_path):
    assert read_description(_write(tmp_path)).shares_prefixes(10**6)
    dynamic = read_description(_write(tmp_path, rope_scaling={"rope_type": "dynamic", "factor": 2.0}))
    assert dynamic.shares_prefixes(512)
    assert not dynamic.shares_prefixes(513)


def test_old_phi3_files_name_longrope_otherwise(tmp_path):
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    outer = {"original_max_position_embeddings": 128}
    (rotation,) = read_description(
        _write(tmp_path, **PHI3, **outer, rope_scaling={"type": "yarn", **factors})
    ).rotations
    assert (rotation.kind, rotation.original_length, rotation.long_factors) == ("longrope", 128.0, (2.0,) * 8)
    assert rotation.attention_factor == pytest.approx((1 + math.log(4) / math.log(128)) ** 0.5)


def test_tables_follow_the_positions_of_each_row():
    rotation = Rotation(theta=1.0, dims=4)
    frequencies = torch.tensor([1.0, 0.5])
    shared = rotation_tables(rotation, frequencies, torch.arange(3), torch.float32)
    assert shared.cosines.shape == shared.sines.shape == (3, 1, 1, 4)
    torch.testing.assert_close(shared.sines[2, 0, 0], torch.tensor([2.0, 1.0, 2.0, 1.0]).sin())
    own = rotation_tables(rotation, frequencies, torch.tensor([[0, 1, 2], [0, 0, 1]]), torch.float32)
    assert own.cosines.shape == (3, 2, 1, 4)
    assert torch.equal(own.sines[:, :1], shared.sines)
    torch.testing.assert_close(own.cosines[2, 1, 0], torch.tensor([1.0, 0.5, 1.0, 0.5]).cos())
    pairs = rotation_tables(
        dataclasses.replace(rotation, interleaved=True), frequencies, torch.arange(3), torch.float32
    )
    torch.testing.assert_close(pairs.sines[2, 0, 0], torch.tensor([2.0, 2.0, 1.0, 1.0]).sin())


def test_tables_follow_the_frequencies_of_each_sequence():
    rotation = Rotation(theta=1.0, dims=2, attention_factor=2.0)
    each = torch.tensor([[1.0], [0.5], [0.25]])
    packed = rotation_tables(rotation, each, torch.tensor([0, 1, 1]), torch.float64)
    assert packed.sines.shape == (3, 1, 1, 2)
    torch.testing.assert_close(packed.sines[:, 0, 0, 0], 2 * torch.tensor([0.0, 0.5, 0.25]).sin().double())
    padded = rotation_tables(rotation, each[:2], torch.arange(3), torch.float64)
    assert padded.sines.shape == (3, 2, 1, 2)
    torch.testing.assert_close(padded.sines[2, :, 0, 1], 2 * torch.tensor([2.0, 1.0]).sin().double())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type 'gpt2' is not supported; supported: deepseek_v3, gemma2, gemma3_text, glm4",
        ),
        ({"model_type": "gemma3"}, "save its text model (Gemma3ForCausalLM, model_type gemma3_text)"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"model_type": ...}, "model_type None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "expected 'LlamaForCausalLM'"),
        ({"model_type": "custom", "auto_map": {"AutoConfig": "run.Me"}}, "model_type 'custom'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 4.0}}, "rotary scaling 'proportional'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -4.0}}, "factor"),
        (
            {**PHI3, "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8}},
            "short_factor",
        ),
        ({**GEMMA2, "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({**GEMMA3, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": "x"}}, "low_freq_factor"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"head_dim": 20, "partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25 gives 5 rotated numbers"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": -2}, "num_hidden_layers"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"head_dim": 17}, "head_dim"),
        ({"torch_dtype": "int8"}, "dtype 'int8'"),
        (
            {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "layer_types": ["chunked_attention"] * 4},
            "config.json",
        ),
    ],
)
def test_refused(tmp_path, changes, message):
    folder = _write(tmp_path, **changes)
    with pytest.raises(ModelError) as caught:
        read_description(folder)
    assert message in str(caught.value)
    assert "config.json" in str(caught.value)


def test_broken_folders(tmp_path):
    with pytest.raises(ModelError, match=r"config.json does not exist"):
        read_description(str(tmp_path))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be read"):
        read_description(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ModelError, match="not a JSON object"):
        read_description(str(tmp_path))
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(str(tmp_path / "config.json"), weights=False)
    with pytest.raises(ModelError, match=r"there is no folder \./nowhere"):
        resolve_model("./nowhere", weights=False)


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="neither a local folder nor a hub model"):
        resolve_model("nobody/no-such-model-here", weights=True)


def _lay_out(tmp_path, model, **options):
    config = _config(tmp_path, **options)
    ranks = config.tensor_model_parallel_size * config.pipeline_model_parallel_size
    return make_layout(config, ranks, model)


def test_layouts_that_do_not_divide_the_model(tmp_path):
    model = read_description(_write(tmp_path))
    _lay_out(tmp_path, model, tensor_model_parallel_size=2, pipeline_model_parallel_size=4)
    _lay_out(tmp_path, model, tensor_model_parallel_size=4)  # two ranks share a key-value head
    with pytest.raises(ConfigError, match="neither divides the model's num_key_value_heads 2 nor is a multiple"):
        _lay_out(tmp_path, model, tensor_model_parallel_size=3)
    with pytest.raises(ConfigError, match="8 is more than the model's num_attention_heads 4"):
        _lay_out(tmp_path, model, tensor_model_parallel_size=8)
    _lay_out(tmp_path, model, pipeline_model_parallel_size=3)  # uneven stages
    with pytest.raises(ConfigError, match="pipeline_model_parallel_size 5 is more than"):
        _lay_out(tmp_path, model, pipeline_model_parallel_size=5)
    with pytest.raises(ConfigError, match="num_layers_per_virtual_pipeline_stage 3 x pipeline_model_parallel_size 2"):
        _lay_out(tmp_path, model, pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=3)
    wide = read_description(_write(tmp_path, intermediate_size=97))
    with pytest.raises(ConfigError, match="intermediate_size 97"):
        _lay_out(tmp_path, wide, tensor_model_parallel_size=2)
    narrow = read_description(_write(tmp_path, head_dim=6, num_attention_heads=16, num_key_value_heads=1))
    with pytest.raises(ConfigError, match="does not divide its head_dim 6"):
        _lay_out(tmp_path, narrow, tensor_model_parallel_size=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "its operators are torch_npu's and run on npu; this is cpu"),
        ({"device": "cuda"}, "this is cuda"),
        ({"sequence_parallel": False}, "found tensor_model_parallel_size 2 without sequence_parallel"),
        ({"tensor_model_parallel_size": 1}, "found tensor_model_parallel_size 1:"),
        ({"bf16": False}, "its operators take no fp32: set bf16: true"),
        ({"tensor_model_parallel_size": 4}, "found 128, the output of the attention of .* on one of 4 tensor-parallel"),
    ],
)
def test_fused_products_that_the_operators_refuse(tmp_path, options, message):
    sizes = {"hidden_size": 512, "head_dim": 128, "intermediate_size": 1024}
    model = read_description(_write(tmp_path, **sizes))
    fused = {"use_ascend_mc2": True, "device": "npu", "bf16": True, "sequence_parallel": True}
    fused["tensor_model_parallel_size"] = 2
    assert _lay_out(tmp_path, model, **fused).tensor == 2
    with pytest.raises(ConfigError, match=message):
        _lay_out(tmp_path, model, **(fused | options))


@pytest.mark.parametrize("family", ["qwen3", "phi3", "deepseek_v3", "shared key-value heads"])
def test_the_sharded_axes_are_those_of_the_weights(tmp_path, family):
    shape = {"heads": 8, "kv_heads": 2} if family == "shared key-value heads" else {}
    model = read_description(str(make_checkpoint(tmp_path, "qwen2" if shape else family, **shape)))
    [chunk] = pipeline_chunks(model, 1, 1)
    ends = ("embedding.word_embeddings.weight", "output_layer.weight")
    slots = [each for each in chunk.slots(model) if each.axis is not None and not each.of_experts]
    shapes = [slot.shape(0, 4) for slot in slots if slot.parameter not in ends]
    assert {size for shape in shapes if len(shape) == 2 for size in shape} == {
        size for _, size in model.sharded_axes(4)
    }


def test_the_first_difference_of_two_models(tmp_path):
    model = read_description(_write(tmp_path))
    assert model.difference(read_description(_write(tmp_path, torch_dtype="float32", initializer_range=0.1))) is None
    others = {
        "vocab_size": ({"vocab_size": 7}, "vocab_size (7) than the trained model (131)"),
        "layers": ({"num_hidden_layers": 3}, "num_hidden_layers (3) than the trained model (4)"),
        "heads": ({"num_key_value_heads": 1}, "layers.0.attention.kv_heads (1) than the trained model (2)"),
    }
    for changes, message in others.values():
        assert model.difference(read_description(_write(tmp_path, **changes))) == message


def test_reading_a_description_imports_no_megatron(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from mindspeed_simpo.model.hf_config import read_description; "
        f"read_description({_write(tmp_path)!r}); assert not [m for m in sys.modules if m.startswith('megatron')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
