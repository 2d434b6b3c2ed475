"""config.json -> ModelSpec: both of transformers' layouts, and everything that is refused."""

import json

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.errors import ConfigError, ModelError
from mindspeed_simpo.model.hf_config import read_description, resolve_model
from mindspeed_simpo.model.rotary import inverse_frequencies, rotation_angles

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


def test_llama_fields(tmp_path):
    spec = read_description(_write(tmp_path, attention_bias=True, mlp_bias=True, head_dim=32))
    assert (spec.family, spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == ("llama", 4, 4, 2, 32)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.qk_norm, spec.tied) == (True, True, True, False, False)
    assert (spec.rms_eps, spec.rope.theta, spec.dtype) == (1e-5, 10000.0, "bfloat16")
    assert [spec.padded_vocab_size(ranks) for ranks in (1, 2, 4)] == [131, 132, 132]


def test_family_variants(tmp_path):
    qwen2 = read_description(_write(tmp_path, model_type="qwen2", architectures=["Qwen2ForCausalLM"]))
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, False, 16)
    qwen3 = read_description(_write(tmp_path, model_type="qwen3", architectures=["Qwen3ForCausalLM"]))
    assert (qwen3.qkv_bias, qwen3.qk_norm) == (False, True)
    mistral = read_description(_write(tmp_path, model_type="mistral", architectures=["MistralForCausalLM"]))
    assert (mistral.qkv_bias, mistral.qk_norm, mistral.sliding_window) == (False, False, 4096)


@pytest.mark.parametrize("name", ["default", "linear", "llama3"])
def test_both_layouts_of_the_rotary_settings_are_read_alike(tmp_path, name):
    settings = {"default": {}, "linear": {"factor": 2.0}, "llama3": LLAMA3}[name]
    old = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": name, **settings} if settings else None}
    new = {"rope_parameters": {"rope_type": name, "rope_theta": 500000.0, **settings}}
    before = read_description(_write(tmp_path, **old))
    after = read_description(_write(tmp_path, **new))
    assert before == after
    assert (after.rope.kind, after.rope.theta) == (name, 500000.0)


def test_the_oldest_layout_names_the_kind_type(tmp_path):
    assert read_description(_write(tmp_path, rope_scaling={"type": "linear", "factor": 4.0})).rope.factor == 4.0


@pytest.mark.parametrize("name", ["linear", "llama3"])
def test_inverse_frequencies_equal_transformers(tmp_path, name):
    settings = {"linear": {"factor": 2.5}, "llama3": LLAMA3}[name]
    folder = _write(tmp_path, head_dim=64, rope_theta=10000.0, rope_scaling={"rope_type": name, **settings})
    expected, scale = ROPE_INIT_FUNCTIONS[name](AutoConfig.from_pretrained(folder), "cpu")
    ours = inverse_frequencies(read_description(folder).rope, 64)
    assert scale == 1.0
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_angles_follow_the_positions_of_each_row():
    frequencies = torch.tensor([1.0, 0.5])
    shared = rotation_angles(frequencies, torch.arange(3))
    assert shared.shape == (3, 1, 1, 4)
    assert shared[2, 0, 0].tolist() == [2.0, 1.0, 2.0, 1.0]
    own = rotation_angles(frequencies, torch.tensor([[0, 1, 2], [0, 0, 1]]))
    assert own.shape == (3, 2, 1, 4)
    assert torch.equal(own[:, :1], shared)
    assert own[2, 1, 0].tolist() == [1.0, 0.5, 1.0, 0.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not supported; supported: llama, mistral, qwen2, qwen3"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"model_type": ...}, "model_type None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "expected 'LlamaForCausalLM'"),
        ({"model_type": "custom", "auto_map": {"AutoConfig": "run.Me"}}, "model_type 'custom'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rotary scaling 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": "x"}}, "low_freq_factor"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
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


def test_layouts_that_do_not_divide_the_model(tmp_path):
    spec = read_description(_write(tmp_path))
    spec.check_layout(_config(tmp_path, tensor_model_parallel_size=2, pipeline_model_parallel_size=4))
    with pytest.raises(ConfigError, match="does not divide the model's num_key_value_heads 2"):
        spec.check_layout(_config(tmp_path, tensor_model_parallel_size=4))
    with pytest.raises(ConfigError, match="does not divide the model's num_attention_heads 4"):
        spec.check_layout(_config(tmp_path, tensor_model_parallel_size=3))
    spec.check_layout(_config(tmp_path, pipeline_model_parallel_size=3))  # uneven stages
    with pytest.raises(ConfigError, match="pipeline_model_parallel_size 5 is more than"):
        spec.check_layout(_config(tmp_path, pipeline_model_parallel_size=5))
    with pytest.raises(ConfigError, match="num_layers_per_virtual_pipeline_stage 3 x pipeline_model_parallel_size 2"):
        spec.check_layout(_config(tmp_path, pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=3))
    wide = read_description(_write(tmp_path, intermediate_size=97))
    with pytest.raises(ConfigError, match="intermediate_size 97"):
        wide.check_layout(_config(tmp_path, tensor_model_parallel_size=2))


def test_a_sliding_window_is_refused_where_it_would_bind(tmp_path):
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    spec = read_description(_write(tmp_path, **mistral, sliding_window=128))
    spec.check_layout(_config(tmp_path, seq_length=128))
    with pytest.raises(ModelError, match="at most 128"):
        spec.check_layout(_config(tmp_path, seq_length=129))
    assert read_description(_write(tmp_path, **mistral, sliding_window=None)).sliding_window is None
    qwen = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": 128}
    assert read_description(_write(tmp_path, **qwen, use_sliding_window=False)).sliding_window is None
    assert (
        read_description(_write(tmp_path, **qwen, use_sliding_window=True, max_window_layers=2)).sliding_window == 128
    )


def test_reading_a_spec_imports_no_megatron(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from mindspeed_simpo.model.hf_config import read_description; "
        f"read_description({_write(tmp_path)!r}); assert not [m for m in sys.modules if m.startswith('megatron')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
