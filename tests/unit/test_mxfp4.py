"""gpt-oss and its weights in MXFP4: what is read, bit by bit as transformers does, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.errors import ConfigError, ModelError
from mindspeed_simpo.model.description import ClampedSwiGLU
from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.model.mxfp4 import dequantized
from mindspeed_simpo.model.naming import hf_tensors
from mindspeed_simpo.model.slots import Span
from mindspeed_simpo.model.weight_source import SafetensorsFolder
from tests import hf


@pytest.fixture
def folder(tmp_path):
    return hf.to_mxfp4(hf.make_checkpoint(tmp_path, "gpt_oss", hidden=64, intermediate=96, dtype="bfloat16"))


def test_every_number_at_every_scale_is_that_of_transformers():
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 1, 16).repeat(1, 256, 1)
    scales = torch.arange(256, dtype=torch.uint8).repeat(16, 1)
    ours, theirs = dequantized(blocks, scales), convert_moe_packed_tensors(blocks[None], scales[None])[0].t()
    assert ours.dtype == theirs.dtype == torch.bfloat16
    finite = theirs.isfinite()
    assert torch.equal(ours.isfinite(), finite)
    assert torch.equal(ours.view(torch.int16)[finite], theirs.contiguous().view(torch.int16)[finite])


def test_what_is_read_is_what_transformers_dequantizes(folder):
    description = read_description(str(folder))
    assert description.mxfp4
    whole = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    expected, source = whole.state_dict(), SafetensorsFolder(folder, description)
    of_experts = [tensor for tensor in hf_tensors(description) if tensor.place is not None]
    assert len(of_experts) == 2 * 4 * 6
    for tensor in of_experts:
        stored = expected[tensor.place.name]
        found = source.read(Span(tensor, 0, tensor.shape[tensor.axis]))
        assert torch.equal(found, tensor.place.view(stored)), tensor.name
        if found.dim() == 2:
            assert source.dtypes[tensor.place.name] == found.dtype == torch.bfloat16
        for start, stop in ((0, 24), (24, 48), (31, 33), (32, 64), (40, 41)):
            part = source.read(Span(tensor, start, stop))
            assert torch.equal(part, found.narrow(tensor.axis, start, stop - start)), (tensor.name, start)


def test_gate_and_up_are_read_once(folder, monkeypatch):
    description = read_description(str(folder))
    source, read = SafetensorsFolder(folder, description), []
    original = SafetensorsFolder._of_expert
    monkeypatch.setattr(SafetensorsFolder, "_of_expert", lambda *args: read.append(args[1].name) or original(*args))
    tensors = {tensor.name: tensor for tensor in hf_tensors(description)}
    gate, up, down = (
        source.read(Span(tensors[f"model.layers.0.mlp.experts.1.{name}_proj.weight"], 0, 32))
        for name in ("gate", "up", "down")
    )
    assert read == ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
    assert (gate.shape, up.shape, down.shape) == ((32, 64), (32, 64), (64, 32))
    assert not torch.equal(gate, up)


def test_a_model_and_its_dequantized_copy_do_not_differ(tmp_path):
    plain = read_description(str(hf.make_checkpoint(tmp_path, "gpt_oss", intermediate=96)))
    quantized = read_description(str(hf.to_mxfp4(tmp_path)))
    assert plain != quantized
    assert plain.difference(quantized) is None
    assert plain.layers[0].experts.activation == ClampedSwiGLU(1.702, 2.5)
    assert [layer.attention.window for layer in plain.layers] == [8, None]


def _edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


BLOCKS, SCALES = (f"model.layers.1.mlp.experts.down_proj_{end}" for end in ("blocks", "scales"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(SCALES), f"lack {SCALES}"),
        (lambda t: t.pop(BLOCKS), f"lack {BLOCKS}"),
        (
            lambda t: t.update({BLOCKS: t[BLOCKS][:, :-1].clone()}),
            r"down_proj_blocks has shape \[4, 63, 3, 16\].*64, 3, 16",
        ),
        (
            lambda t: t.update({SCALES: t[SCALES][..., :-1].clone()}),
            r"down_proj_scales has shape \[4, 64, 2\].*\[4, 64, 3\]",
        ),
        (lambda t: t.update({SCALES: t[SCALES].float()}), "down_proj_scales is stored as F32; expected one of U8"),
        (
            lambda t: t.update({BLOCKS.removesuffix("_blocks"): torch.zeros(4, 96, 64)}),
            "which config.json does not describe",
        ),
    ],
)
def test_damaged_weights(folder, change, message):
    _edit(folder, change)
    with pytest.raises(ModelError, match=message):
        SafetensorsFolder(folder, read_description(str(folder)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8'.*or one with quant_method mxfp4"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported with experts"),
        ({"hidden_size": 60}, "hidden_size 60 is not a multiple of 32"),
        ({"intermediate_size": 100}, "intermediate_size 100 is not a multiple of 32"),
        ({"rope_parameters": None}, "rope_scaling is not in the file"),
        ({"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
    ],
)
def test_refused_settings(folder, changes, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=message):
        read_description(str(folder))


def test_blocks_without_a_quantization_config(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": None}))
    with pytest.raises(ModelError, match=r"lack model\.layers\.0\.mlp\.experts\.down_proj"):
        SafetensorsFolder(folder, read_description(str(folder)))


def test_the_ring_has_no_sinks(folder):
    options = {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo", "device": "npu"}
    config = Config(
        model_name_or_path=str(folder), data_path="-", batching="padded", seq_length=8, global_batch_size=8, **options
    )
    with pytest.raises(ConfigError, match="megatron_cp_algo has no attention sinks"):
        make_layout(config, 2, read_description(str(folder)))


def test_experts_have_no_adapters(folder):
    from mindspeed_simpo.model.adapters import Adapters

    description = read_description(str(folder))
    options = {"model_name_or_path": "-", "data_path": "-", "lora_r": 4}
    adapters = Adapters.of(Config(**options), description)
    assert adapters.modules == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert not adapters.adapt_experts(description)
    with pytest.raises(ConfigError, match="gpt_oss has no projection 'gate_proj' that can have an adapter"):
        Adapters.of(Config(**options, lora_target_modules=["gate_proj"]), description)
