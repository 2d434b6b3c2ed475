"""Import, export and random initialisation: bit for bit, in every layout, and loadable by transformers."""

import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Mxfp4Config

from tests.hf import to_mxfp4
from tests.ranks.launcher import run_ranks
from tests.ranks.model_helpers import (
    CHAT_TEMPLATE,
    EP,
    ETP,
    FROZEN,
    engine_model,
    make_checkpoint,
    make_tokenizer,
    stored_tensors,
)

pytestmark = pytest.mark.newest_core

FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None, "head_dim": 24},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {},
    "glm4": {},
    "qwen3_moe": {},
    "mixtral": {},
    "glm4_moe": {},
    "deepseek_v3": {},
    "gpt_oss": {},
}


def _export(folder, layout, output, max_shard_bytes=10**9, change=0.0, rounded=False, **options):
    from mindspeed_simpo.errors import ModelError
    from mindspeed_simpo.model.export_folder import Companions
    from mindspeed_simpo.model.megatron.export import export_hf

    description, groups, models = engine_model(folder, layout, **options)
    if rounded:
        from megatron.core.transformer.module import Float16Module

        models = [Float16Module(model.config, model) for model in models]
    with torch.no_grad():
        for parameter in models[0].parameters() if change else ():  # -0.0 + 0.0 has other bits
            parameter.add_(change)
    try:
        export_hf(
            models,
            description,
            groups,
            beside=Companions(Path(folder), make_tokenizer()),
            output=Path(output),
            max_shard_bytes=max_shard_bytes,
        )
    except ModelError as error:
        return str(error)
    return None


def _assert_same_bits(left, right):
    left, right = stored_tensors(left), stored_tensors(right)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        integers = {2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
        assert torch.equal(tensor.view(integers), right[name].view(integers)), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_then_export_changes_no_bit(tmp_path, family, dtype):
    source = make_checkpoint(tmp_path / "source", family, dtype=dtype, **FAMILIES[family])
    run_ranks(_export, 1, source, (1, 1, 1), str(tmp_path / "out"))
    _assert_same_bits(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == str(dtype).removeprefix("torch.")


SEVEN_HEADS = {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 112}
LAYOUTS = [
    *((family, (2, 2, 1), {}) for family in FAMILIES),
    ("qwen2", (2, 1, 1), {}),
    ("llama", (1, 2, 2), {}),
    # more ranks than key-value heads; heads that the ranks do not divide
    ("qwen2", (4, 1, 1), {}),
    ("qwen2", (2, 2, 1), SEVEN_HEADS),
    ("phi3", (4, 1, 1), SEVEN_HEADS),
    ("glm4", (4, 1, 1), {}),
]


@pytest.mark.parametrize(("family", "layout", "shape"), LAYOUTS)
def test_every_layout_exports_the_same_bits(tmp_path, family, layout, shape):
    source = make_checkpoint(tmp_path / "source", family, dtype=torch.bfloat16, **FAMILIES[family], **shape)
    run_ranks(_export, np.prod(layout), source, layout, str(tmp_path / "out"), bf16=True)
    _assert_same_bits(source, tmp_path / "out")


EXPERT_LAYOUTS = [
    ("qwen3_moe", (1, 1, 4), {EP: 2, ETP: 2}),
    ("mixtral", (2, 1, 2), {EP: 4, ETP: 1}),
    ("glm4_moe", (2, 2, 1), {EP: 2, ETP: 1}),
    ("deepseek_v3", (2, 2, 1), {EP: 2, ETP: 1}),
    ("gpt_oss", (2, 1, 2), {EP: 2, ETP: 2}),
]


@pytest.mark.parametrize(("family", "layout", "options"), EXPERT_LAYOUTS)
def test_experts_of_every_layout_export_the_same_bits(tmp_path, family, layout, options):
    source = make_checkpoint(tmp_path / "source", family, dtype=torch.bfloat16)
    run_ranks(_export, np.prod(layout), source, layout, str(tmp_path / "out"), bf16=True, **options)
    _assert_same_bits(source, tmp_path / "out")


def test_each_rank_reads_its_experts(tmp_path):
    source = make_checkpoint(tmp_path, "qwen3_moe")
    ranks = run_ranks(_inspect, 4, source, (1, 1, 4), **{EP: 2, ETP: 2})
    for number, rank in enumerate(ranks):
        experts = {name: shape for name, shape in rank["read"].items() if ".0.mlp.experts" in name}
        own = range(0, 2) if number < 2 else range(2, 4)
        halves = {"gate_proj": (24, 64), "up_proj": (24, 64), "down_proj": (64, 24)}
        prefix = "model.layers.0.mlp.experts"
        assert experts == {f"{prefix}.{e}.{part}.weight": shape for e in own for part, shape in halves.items()}


@pytest.mark.parametrize(
    ("layout", "options"), [((1, 1, 1), {}), ((2, 1, 2), {EP: 2, ETP: 2}), ((2, 2, 1), {EP: 2, ETP: 1})]
)
def test_weights_in_mxfp4_are_exported_as_transformers_dequantizes_them(tmp_path, layout, options):
    source = to_mxfp4(make_checkpoint(tmp_path / "source", "gpt_oss", dtype=torch.bfloat16))
    run_ranks(_export, np.prod(layout), str(source), layout, str(tmp_path / "out"), bf16=True, **options)
    dequantized = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    expected, written = dequantized.state_dict(), stored_tensors(tmp_path / "out")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == torch.bfloat16
        assert torch.equal(written[name].view(torch.int16), tensor.to(torch.bfloat16).view(torch.int16)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())


def test_the_router_bias_keeps_its_dtype(tmp_path):
    """Rounded to bfloat16 it would choose other experts."""
    source = make_checkpoint(tmp_path / "source", "glm4_moe", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors |= {name: torch.randn(4) for name in tensors if name.endswith(FROZEN)}
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    run_ranks(_export, 1, source, (1, 1, 1), str(tmp_path / "out"), bf16=True, rounded=True)
    _assert_same_bits(source, tmp_path / "out")


def test_a_folder_of_mixed_dtypes_keeps_them(tmp_path):
    source = make_checkpoint(tmp_path / "source", "qwen3", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if tensor.dim() == 1}
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    run_ranks(_export, 1, source, (1, 1, 1), str(tmp_path / "out"))
    _assert_same_bits(source, tmp_path / "out")


def test_sharded_in_and_out(tmp_path):
    source = make_checkpoint(tmp_path / "source", "llama", max_shard_size="60KB", **FAMILIES["llama"])
    # some tensors are larger than a shard, and so get one of their own out of turn
    run_ranks(_export, 2, source, (2, 1, 1), str(tmp_path / "out"), max_shard_bytes=30_000)
    _assert_same_bits(source, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored_tensors(source).values())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_transformers_loads_the_export_and_generates(tmp_path):
    source = make_checkpoint(tmp_path / "source", "qwen2", **FAMILIES["qwen2"])
    GenerationConfig(bos_token_id=1, eos_token_id=2, max_new_tokens=7).save_pretrained(source)
    run_ranks(_export, 1, source, (1, 1, 1), str(tmp_path / "out"), change=0.01)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello world"}], tokenize=False)
    generated = model.generate(**tokenizer(text, return_tensors="pt", return_token_type_ids=False), do_sample=False)
    assert generated.shape[1] > len(tokenizer(text)["input_ids"])
    assert GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 7
    before = AutoModelForCausalLM.from_pretrained(source)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before.get_parameter(name) + 0.01)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_earlier_export_is_replaced_and_anything_else_is_not(tmp_path):
    source = make_checkpoint(tmp_path / "source", "qwen3")
    output = tmp_path / "deep" / "out"
    assert run_ranks(_export, 2, source, (1, 2, 1), str(output), change=1.0) == [None, None]
    assert run_ranks(_export, 2, source, (1, 2, 1), str(output)) == [None, None]
    _assert_same_bits(source, output)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    message, other_rank = run_ranks(_export, 2, source, (1, 2, 1), str(tmp_path / "mine"))
    assert "not an earlier export" in message
    assert other_rank is None
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    (tmp_path / "file").write_text("")
    assert "cannot be written" in run_ranks(_export, 1, source, (1, 1, 1), str(tmp_path / "file" / "out"))[0]


def test_random_weights_are_the_same_in_every_layout(tmp_path):
    source = make_checkpoint(tmp_path / "source", "qwen3", tie_word_embeddings=True)
    (tmp_path / "source" / "model.safetensors").unlink()
    for number, layout in enumerate([(1, 1, 1), (2, 2, 1)]):
        run_ranks(_export, np.prod(layout), source, layout, str(tmp_path / str(number)), init_from="config", seed=7)
    run_ranks(_export, 1, source, (1, 1, 1), str(tmp_path / "other"), init_from="config", seed=8)
    _assert_same_bits(tmp_path / "0", tmp_path / "1")
    first, other = stored_tensors(tmp_path / "0"), stored_tensors(tmp_path / "other")
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert first["model.embed_tokens.weight"].std() == pytest.approx(0.02, rel=0.05)


def _inspect(folder, layout=(2, 2, 1), **options):
    from mindspeed_simpo.model.megatron import weights as hf_weights

    read = {}
    original = hf_weights.SafetensorsFolder.read

    def recording(self, span):
        part = original(self, span)
        assert span.tensor.name not in read, "read twice"
        read[span.tensor.name] = tuple(part.shape)
        return part

    hf_weights.SafetensorsFolder.read = recording
    try:
        _, groups, (model,) = engine_model(folder, layout, **options)
    finally:
        hf_weights.SafetensorsFolder.read = original
    marked = {
        name: (parameter.partition_dim, tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if getattr(parameter, "tensor_model_parallel", False)
    }
    return {
        "read": read,
        "marked": marked,
        "names": [name for name, _ in model.named_parameters()],
        "shared": getattr(model.shared_embedding_or_output_weight(), "shared_embedding", None),
        "padding": float(model.output_layer.weight.detach()[65:].abs().sum()) if groups.is_last_pipeline_rank else None,
    }


def test_each_rank_reads_its_slices_and_marks_its_shards(tmp_path):
    source = make_checkpoint(tmp_path / "source", "qwen2", tie_word_embeddings=True)
    ranks = run_ranks(_inspect, 4, source)
    layer = "model.layers.0."
    assert ranks[0]["read"]["model.embed_tokens.weight"] == (66, 64)
    assert ranks[1]["read"]["model.embed_tokens.weight"] == (65, 64)
    assert ranks[3]["read"]["model.embed_tokens.weight"] == (65, 64), "the tied head's copy"
    assert ranks[0]["read"][f"{layer}self_attn.q_proj.weight"] == (32, 64)
    assert ranks[0]["read"][f"{layer}mlp.down_proj.weight"] == (64, 48)
    assert not [name for name in ranks[0]["read"] if "layers.1" in name or name == "model.norm.weight"]
    assert not [name for name in ranks[2]["read"] if "layers.0" in name]
    for rank in ranks:
        unmarked = [name for name in rank["names"] if name not in rank["marked"]]
        assert all("layernorm" in name for name in unmarked), unmarked
        assert rank["shared"] is True
    assert ranks[0]["marked"]["decoder.layers.0.mlp.linear_fc2.weight"] == (1, (64, 48))
    assert ranks[0]["marked"]["decoder.layers.0.self_attention.linear_qkv.bias"] == (0, (64,))
    assert ranks[3]["padding"] == 0.0
    assert ranks[2]["padding"] > 0.0


def _planted(folder, mistake):
    from mindspeed_simpo.errors import ModelError
    from mindspeed_simpo.model import naming
    from mindspeed_simpo.model.slots import HFTensor, Slot

    original = naming.Chunk.slots

    def slots(self, description):
        found = list(original(self, description))
        if mistake == "uncovered":
            del found[2]
        elif mistake == "doubled":
            found.append(found[1])
        elif mistake == "absent":
            found.append(Slot("decoder.layers.0.adapter.weight", found[1].tensors, kind="adapter"))
        else:
            found[1] = Slot(found[1].parameter, (HFTensor("x", (7,)),))
        return iter(found)

    naming.Chunk.slots = slots
    try:
        engine_model(folder, (1, 1, 1))
    except ModelError as error:
        return str(error)
    finally:
        naming.Chunk.slots = original


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("uncovered", "decoder.layers.0.self_attention.linear_qkv.weight has no slot"),
        ("doubled", "decoder.layers.0.input_layernorm.weight has more than one slot"),
        ("absent", "decoder.layers.0.adapter.weight has a slot but no values"),
        ("misshapen", "the shape (7,); the module has (64,)"),
    ],
)
def test_slots_cover_every_parameter_exactly_once(tmp_path, mistake, message):
    folder = make_checkpoint(tmp_path, "llama")
    assert message in run_ranks(_planted, 1, folder, mistake)[0]


def _export_to_a_slow_disk(folder, layout, output):
    import mindspeed_simpo.model.export_folder as export
    import mindspeed_simpo.parallel as parallel

    write, initialize = export.save_file, parallel.initialize

    def slowly(*args, **kwargs):
        time.sleep(2)
        write(*args, **kwargs)

    export.save_file, parallel.initialize = slowly, partial(initialize, timeout_minutes=1 / 60)
    try:
        return _export(folder, layout, output, max_shard_bytes=150_000)
    finally:
        export.save_file, parallel.initialize = write, initialize


@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 1)])
def test_a_slow_disk_of_the_first_rank_is_waited_for(tmp_path, layout):
    source = make_checkpoint(tmp_path / "source", "llama", **FAMILIES["llama"])
    run_ranks(_export_to_a_slow_disk, 2, source, layout, str(tmp_path / "out"))
    _assert_same_bits(source, tmp_path / "out")
