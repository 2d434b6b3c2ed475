"""Adapters: their keys, which projections a model has, and how the factors follow from the slots of the weights."""

import math

import pytest

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.model.adapters import Adapters, InitialAdapters, projections
from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.model.naming import pipeline_chunks
from tests.hf import make_checkpoint

ALL = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def config(**values):
    return Config(model_name_or_path="model", data_path="pairs", **values)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3", head_dim=16, heads=6, kv_heads=2)
    return read_description(str(folder))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lora_alpha": 8}, ["lora_alpha", "set lora_r"]),
        ({"lora_load": "x", "lora_target_modules": ["q_proj"]}, ["lora_target_modules, lora_load", "or remove them"]),
        ({"lora_dropout": 0.1}, ["lora_dropout", "set lora_r"]),
        ({"lora_r": 4, "lora_dropout": 1}, ["lora_dropout"]),
        ({"lora_r": 4, "lora_target_modules": []}, ["at least one name"]),
        ({"lora_r": -1}, ["lora_r"]),
        ({"lora_r": 4, "lora_alpha": 0}, ["lora_alpha"]),
    ],
)
def test_keys_that_contradict_each_other(values, words):
    with pytest.raises(ValueError, match="lora") as error:
        config(**values)
    assert all(word in str(error.value) for word in words)


def test_alpha_is_twice_the_rank_by_default(model):
    assert Adapters.of(config(lora_r=16), model).scale == 2
    assert Adapters.of(config(lora_r=16, lora_alpha=4), model).scale == 0.25
    assert Adapters.of(config(), model) is None


def test_modules_are_those_of_the_model(model, tmp_path):
    assert projections(model) == ALL
    assert Adapters.of(config(lora_r=1), model).modules == ALL
    some = Adapters.of(config(lora_r=1, lora_target_modules=["v_proj", "q_proj", "v_proj"]), model)
    assert some.modules == ("q_proj", "v_proj")
    fused = read_description(str(make_checkpoint(tmp_path, "phi3")))
    assert projections(fused) == ("down_proj", "gate_up_proj", "o_proj", "qkv_proj")


def test_projections_of_experts_are_adapted_with_those_of_their_name(tmp_path):
    model = read_description(str(make_checkpoint(tmp_path, "glm4_moe", head_dim=16)))
    assert projections(model) == ALL
    adapters = Adapters.of(config(lora_r=2, lora_target_modules=["gate_proj", "up_proj"]), model)
    names = {tensor.name.removesuffix(".lora_A.weight") for tensor in adapters.hf_tensors(model)}
    places = ["0.mlp", "1.mlp.shared_experts", *(f"1.mlp.experts.{number}" for number in range(4))]
    for module in adapters.modules:
        assert {f"model.layers.{place}.{module}" for place in places} <= names
    beside = ["mlp.gate_proj.weight", "mlp.shared_experts.gate_proj.weight"]
    assert adapters.beside_experts(model) == sorted(beside + [name.replace("gate", "up") for name in beside])
    latent = read_description(str(make_checkpoint(tmp_path / "latent", "deepseek_v3")))
    assert projections(latent) == (
        *("down_proj", "gate_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj", "up_proj"),
    )
    with pytest.raises(ConfigError, match="up_proj is missing: transformers stores the gate_proj and up_proj of an"):
        Adapters.of(config(lora_r=2, lora_target_modules=["gate_proj"]), model)


@pytest.mark.parametrize("expert_ranks", [1, 2])
def test_the_ranks_of_experts_hold_each_factor_once(tmp_path, expert_ranks):
    """Two expert-tensor ranks: one factor of each projection is divided, and the ranks have copies of the other."""
    model = read_description(str(make_checkpoint(tmp_path, "mixtral", layers=1)))
    adapters = Adapters.of(config(lora_r=3, lora_target_modules=["w1", "w2", "w3"]), model)
    [whole] = pipeline_chunks(model, 1, expert_tensor_ranks=2)
    slots, size = list(adapters.slots_of(whole, model)), 2 * expert_ranks
    assert [slot.parameter.split("experts.")[1] for slot in slots] == [
        f"{place}_adapters.{module}.lora_{factor}"
        for place, modules in (("linear_fc1", ("w1", "w3")), ("linear_fc2", ("w2",)))
        for module in modules
        for factor in "AB"
    ]
    for slot in slots:
        held = [(rank, span) for rank in range(size) if not slot.is_copy(rank) for span in slot.spans(rank, size)]
        assert len(held) == (4 if slot.axis is None else 8)
        for tensor in slot.tensors:
            covered = sorted(e for _, span in held if span.tensor == tensor for e in range(span.start, span.stop))
            assert covered == list(range(tensor.shape[slot.axis or 0]))
        assert slot.shape(0, size)[0] == 4 // expert_ranks
    assert adapters.count(model, [whole], size) == sum(math.prod(slot.shape(0, size)) for slot in slots)
    assert adapters.count(model, [whole], experts=False) == 0


@pytest.mark.parametrize(
    ("module", "hint"),
    [("gate", "did you mean gate_proj"), ("lm_head", "Known are down_proj"), ("linear_qkv", "Known")],
)
def test_an_unknown_module_names_the_nearest(model, module, hint):
    with pytest.raises(ConfigError, match="lora_target_modules: qwen3 has no projection") as error:
        Adapters.of(config(lora_r=1, lora_target_modules=["q_proj", module]), model)
    assert hint in str(error.value)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_shards_of_the_factors_cover_each_factor_once(model, size):
    """Four ranks share two key-value heads and divide three queries of each, one of which is padding."""
    adapters = Adapters.of(config(lora_r=3), model)
    [whole] = pipeline_chunks(model, 1)
    slots = list(adapters.slots(whole.slots(model)))
    assert [tensor.name for slot in slots for tensor in slot.tensors] == [t.name for t in adapters.hf_tensors(model)]
    assert len(slots) == 2 * len(ALL) * model.num_layers
    for slot in slots:
        [tensor] = slot.tensors
        held = [span for rank in range(size) for span in slot.spans(rank, size) if span.tensor is not None]
        covered = sorted(element for span in held for element in range(span.start, span.stop))
        whole_axis = list(range(tensor.shape[slot.axis or 0]))
        assert covered == (whole_axis if slot.axis is not None else sorted(whole_axis * size))
        sharded = {"lora_B": 0, "lora_A": None} if "o_proj" not in tensor.name and "down" not in tensor.name else {}
        assert slot.axis == (sharded or {"lora_A": 1, "lora_B": None})[tensor.name.rsplit(".", 2)[1]]


def test_factors_are_peft_s_shapes_and_first_values(model):
    adapters = Adapters.of(config(lora_r=3, lora_target_modules=["k_proj"]), model)
    a, b, *_ = adapters.hf_tensors(model)
    assert (a.name, a.shape) == ("model.layers.0.self_attn.k_proj.lora_A.weight", (3, 64))
    assert (b.name, b.shape) == ("model.layers.0.self_attn.k_proj.lora_B.weight", (32, 3))
    [slot, *_] = adapters.slots(pipeline_chunks(model, 1)[0].slots(model))
    [span] = slot.spans(0, 1)
    values = InitialAdapters(5).read(span)
    assert values.abs().max() <= 1 / math.sqrt(64)
    assert values.equal(InitialAdapters(5).read(span))
    assert not values.equal(InitialAdapters(6).read(span))
