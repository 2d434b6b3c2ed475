"""Safetensors folders: what is read, and every way they can be broken."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.families import families
from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.model.naming import hf_tensors, pipeline_chunks, stored_shapes
from mindspeed_simpo.model.slots import Span, joined
from mindspeed_simpo.model.weight_source import INDEX_FILE, SINGLE_FILE, RandomWeights, SafetensorsFolder
from tests.ranks.model_helpers import CONFIGS, make_checkpoint

FAMILIES = [(family, {}) for family in CONFIGS] + [("llama", {"attention_bias": True, "mlp_bias": True})]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("whole"), "qwen2")


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def _write_config(folder, family, **shape):
    sizes = {"vocab_size": 131, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0}
    default = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    CONFIGS[family](**(default | sizes | shape), tie_word_embeddings=False).save_pretrained(folder)


def _open(folder):
    return SafetensorsFolder(folder, read_description(str(folder)))


@pytest.mark.parametrize(("family", "options"), FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_table_names_what_transformers_saves(tmp_path, family, options, tied):
    make_checkpoint(tmp_path, family, tie_word_embeddings=tied, **options)
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / SINGLE_FILE).items()}
    spec = read_description(str(tmp_path))
    assert set(CONFIGS) == set(families())
    assert stored_shapes(spec) == stored
    stages = [slot for chunk in pipeline_chunks(spec, 2) for slot in chunk.slots(spec)]
    tensors = [tensor for slot in stages if not slot.replica for tensor in slot.tensors]
    assert len(set(tensors)) == len(tensors)
    together = {tensor.place.name for tensor in tensors if tensor.place is not None}
    assert sorted([*(t.name for t in tensors if t.place is None), *together]) == sorted(stored)
    assert sum(slot.replica for slot in stages) == tied


LAYOUTS = [
    ({}, 1),
    ({}, 2),
    ({"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 12}, 4),
    ({"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12}, 4),
]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("shape", "ranks"), LAYOUTS)
def test_the_ranks_together_hold_every_element_once(tmp_path, family, shape, ranks):
    shape = shape if family != "qwen2" else {key: value for key, value in shape.items() if key != "head_dim"}
    heads = shape.get("num_attention_heads", 4)
    if family == "deepseek_v3":  # each head has its own keys and values, and the ranks divide the heads
        heads = -(-heads // ranks) * ranks
        shape = {"num_attention_heads": heads, "num_key_value_heads": heads}
    _write_config(tmp_path, family, hidden_size=12 * heads, **shape)
    description = read_description(str(tmp_path))
    for slot in pipeline_chunks(description, 1)[0].slots(description):
        if slot.axis is None:
            continue
        counts = {tensor: torch.zeros(tensor.shape[slot.axis], dtype=torch.int64) for tensor in slot.tensors}
        for rank in range(ranks):
            for span in slot.spans(rank, ranks):
                if span.tensor is not None:
                    counts[span.tensor][span.start : span.stop] += 1
        assert all(torch.all(count == 1) for count in counts.values()), slot.parameter
        assert len({slot.shape(rank, ranks) for rank in range(ranks)}) == 1, "unequal parameters"


def test_queries_keys_and_values_alternate_by_group(folder):
    description = read_description(str(folder))
    slots = {slot.parameter: slot for slot in pipeline_chunks(description, 1)[0].slots(description)}
    for suffix in ("weight", "bias"):
        spans = slots[f"decoder.layers.0.self_attention.linear_qkv.{suffix}"].spans(0, 1)
        found = [(span.tensor.name.split(".")[4], span.start, span.stop) for span in spans]
        group = [("q_proj", 0, 32), ("k_proj", 0, 16), ("v_proj", 0, 16)]
        assert found == [*group, ("q_proj", 32, 64), ("k_proj", 16, 32), ("v_proj", 16, 32)]


def test_spans_are_read_in_one_piece(folder):
    description = read_description(str(folder))
    slots = {slot.parameter: slot for slot in pipeline_chunks(description, 1)[0].slots(description)}
    spans = slots["decoder.layers.0.self_attention.linear_qkv.weight"].spans(0, 1)
    assert [(span.start, span.stop) for span in joined(spans)] == [(0, 32), (0, 64), (0, 32)]
    source, stored = _open(folder), load_file(folder / SINGLE_FILE)
    for whole in joined(spans):
        assert torch.equal(source.read(whole), stored[whole.tensor.name])
    columns = slots["decoder.layers.0.mlp.linear_fc2.weight"].spans(1, 2)
    assert torch.equal(source.read(columns[0]), stored["model.layers.0.mlp.down_proj.weight"][:, 48:])


def test_random_weights_depend_on_seed_and_name_alone(folder):
    spec = read_description(str(folder))
    tensors = {tensor.name: tensor for tensor in hf_tensors(spec)}
    first, again, other = RandomWeights(spec, 1), RandomWeights(spec, 1), RandomWeights(spec, 2)
    gate = tensors["model.layers.0.mlp.gate_proj.weight"]
    whole = first.read(Span(gate, 0, 96))
    assert torch.equal(whole, torch.cat([again.read(Span(gate, start, start + 48)) for start in (0, 48)]))
    assert not torch.equal(whole, other.read(Span(gate, 0, 96)))
    assert not torch.equal(whole, first.read(Span(tensors["model.layers.1.mlp.gate_proj.weight"], 0, 96)))
    assert 0.9 < whole.std() / spec.initializer_range < 1.1
    assert torch.all(first.read(Span(tensors["model.norm.weight"], 0, 64)) == 1)
    assert torch.all(first.read(Span(tensors["model.layers.0.self_attn.q_proj.bias"], 0, 64)) == 0)


def _edit(folder, change):
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE)


def _refused(folder, *messages):
    with pytest.raises(ModelError) as caught:
        _open(folder)
    for message in messages:
        assert message in str(caught.value)


def test_missing_and_left_over_tensors(folder):
    _edit(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    _refused(folder, "lack model.layers.1.mlp.up_proj.weight")
    _edit(folder, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(96, 64)}))
    _open(folder)
    _edit(folder, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(96, 64)}))
    _refused(folder, "hold model.layers.2.mlp.up_proj.weight", "does not describe")


def test_tensors_that_transformers_ignores_too(tmp_path):
    make_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    _edit(tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(131, 64)}))
    _edit(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    assert "lm_head.weight" not in _open(tmp_path).dtypes


def test_wrong_shape_and_wrong_dtype(folder):
    _edit(folder, lambda t: t.update({"model.norm.weight": torch.zeros(65)}))
    _refused(folder, SINGLE_FILE, "model.norm.weight has shape [65]", "[64]")
    _edit(folder, lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}))
    _refused(folder, "stored as I8")


@pytest.mark.parametrize("size", [0, 5, 4000, -1])
def test_truncated_file(folder, size):
    content = (folder / SINGLE_FILE).read_bytes()
    (folder / SINGLE_FILE).write_bytes(content[:size])
    _refused(folder, SINGLE_FILE, "truncated or not a safetensors file")


def test_no_weights_and_pickle_only(folder):
    (folder / SINGLE_FILE).unlink()
    _refused(folder, "has no weights")
    torch.save({}, folder / "pytorch_model.bin")
    _refused(folder, "pytorch_model.bin is pickle, which is never read")


def test_shards(tmp_path):
    make_checkpoint(tmp_path, "qwen2", max_shard_size="100KB")
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    tensor = next(t for t in hf_tensors(read_description(str(tmp_path))) if t.name == "lm_head.weight")
    with safe_open(tmp_path / index["weight_map"]["lm_head.weight"], "pt") as file:
        assert torch.equal(_open(tmp_path).read(Span(tensor, 0, 131)), file.get_tensor("lm_head.weight"))
    (tmp_path / files[1]).rename(tmp_path / "elsewhere")
    _refused(tmp_path, INDEX_FILE, files[1], "does not hold")
    for broken in ("{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        (tmp_path / INDEX_FILE).write_text(broken)
        _refused(tmp_path, INDEX_FILE)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "../elsewhere"}}))
    _refused(tmp_path, "../elsewhere")
