"""Safetensors folders: what is read, and every way they can be broken."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.model.naming import hf_tensors, pipeline_chunks
from mindspeed_simpo.model.weight_source import INDEX_FILE, SINGLE_FILE, RandomWeights, SafetensorsFolder
from tests.ranks.model_helpers import make_checkpoint

FAMILIES = [("llama", {"attention_bias": True, "mlp_bias": True}), ("mistral", {}), ("qwen2", {}), ("qwen3", {})]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("whole"), "qwen2")


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def _open(folder):
    return SafetensorsFolder(folder, read_description(str(folder)))


@pytest.mark.parametrize(("family", "options"), FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_table_names_what_transformers_saves(tmp_path, family, options, tied):
    make_checkpoint(tmp_path, family, tie_word_embeddings=tied, **options)
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / SINGLE_FILE).items()}
    spec = read_description(str(tmp_path))
    assert {tensor.name: tensor.shape for tensor in hf_tensors(spec)} == stored
    stages = [slot for chunk in pipeline_chunks(spec, 2) for slot in chunk.slots(spec)]
    assert sorted(t.name for slot in stages if not slot.replica for t in slot.tensors) == sorted(stored)
    assert sum(slot.replica for slot in stages) == tied


def test_slices_tile_every_tensor(folder):
    source = _open(folder)
    stored = load_file(folder / SINGLE_FILE)
    for tensor in hf_tensors(read_description(str(folder))):
        parts = [source.read(tensor, rank, 2) for rank in range(2)]
        whole = parts[0] if tensor.axis is None else torch.cat(parts, tensor.axis)
        assert torch.equal(whole, stored[tensor.name])
        if tensor.axis is not None:
            assert parts[0].shape[tensor.axis] == -(-tensor.shape[tensor.axis] // 2)


@pytest.mark.parametrize("bias", [False, True])
def test_fusing_interleaves_by_group_and_is_undone(folder, bias):
    spec = read_description(str(folder))
    slots = {slot.parameter: slot for slot in pipeline_chunks(spec, 1)[0].slots(spec)}
    slot = slots[f"decoder.layers.0.self_attention.linear_qkv.{'bias' if bias else 'weight'}"]
    slices = [torch.arange(t.shape[0] * 1.0).add(1000 * i) for i, t in enumerate(slot.tensors)]
    slices = slices if bias else [part[:, None].expand(-1, 3) for part in slices]
    fused = slot.fuse(slices, spec)
    first = fused if bias else fused[:, 0]
    head = spec.head_dim
    assert first[: 2 * head].tolist() == list(range(2 * head))
    assert first[2 * head] == 1000
    assert first[3 * head] == 2000
    assert first[4 * head] == 2 * head
    for part, again in zip(slices, slot.unfuse(fused, spec), strict=True):
        assert torch.equal(part, again)


def test_random_weights_depend_on_seed_and_name_alone(folder):
    spec = read_description(str(folder))
    tensors = {tensor.name: tensor for tensor in hf_tensors(spec)}
    first, again, other = RandomWeights(spec, 1), RandomWeights(spec, 1), RandomWeights(spec, 2)
    gate = tensors["model.layers.0.mlp.gate_proj.weight"]
    whole = first.read(gate, 0, 1)
    assert torch.equal(whole, torch.cat([again.read(gate, rank, 2) for rank in range(2)]))
    assert not torch.equal(whole, other.read(gate, 0, 1))
    assert not torch.equal(whole, first.read(tensors["model.layers.1.mlp.gate_proj.weight"], 0, 1))
    assert 0.9 < whole.std() / spec.initializer_range < 1.1
    assert torch.all(first.read(tensors["model.norm.weight"], 0, 1) == 1)
    assert torch.all(first.read(tensors["model.layers.0.self_attn.q_proj.bias"], 0, 1) == 0)


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
        assert torch.equal(_open(tmp_path).read(tensor, 0, 1), file.get_tensor("lm_head.weight"))
    (tmp_path / files[1]).rename(tmp_path / "elsewhere")
    _refused(tmp_path, INDEX_FILE, files[1], "does not hold")
    for broken in ("{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        (tmp_path / INDEX_FILE).write_text(broken)
        _refused(tmp_path, INDEX_FILE)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "../elsewhere"}}))
    _refused(tmp_path, "../elsewhere")
