"""``backend: fsdp`` against the model of transformers in fp64, one row at a time: loss and every gradient."""

import json

import pytest
import torch

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.supported import CLAIMS
from mindspeed_simpo.config.validation import make_layout
from tests.hf import make_token_pairs
from tests.oracle_objectives import Options
from tests.ranks.fsdp_models import (
    FAMILIES,
    PADDED_ONLY,
    VOCABULARY,
    by_transformers,
    check_step,
    fsdp_steps,
    make_adapter,
    make_model,
)
from tests.ranks.parity import worst_error

pytestmark = pytest.mark.newest_core
PACKED = [family for family in FAMILIES if family not in PADDED_ONLY]


@pytest.mark.parametrize("family", PACKED)
def test_a_family(tmp_path, family):
    folder = make_model(tmp_path / "model", family)
    pairs = make_token_pairs(8, VOCABULARY)
    expected = by_transformers(folder, pairs, Options())
    for form, ranks, fused in (("padded", 1, True), ("packed", 1, False), ("prefix_shared", 2, True)):
        found = fsdp_steps(folder, [pairs], ranks, batching=form, fused_logprob=fused)
        assert found["batching"] == form
        check_step(found, expected)
    adapters = make_adapter(tmp_path / "adapter", folder)
    expected = by_transformers(folder, pairs, Options(), tmp_path / "adapter")
    check_step(fsdp_steps(folder, [pairs], 2, batching="prefix_shared", **adapters), expected)


@pytest.mark.parametrize("family", PADDED_ONLY)
def test_a_family_with_recurrent_layers(tmp_path, family):
    """The recurrent layers of transformers lose digits in fp32: what is computed is as near to fp64 as they are."""
    folder = make_model(tmp_path / "model", family)
    pairs = make_token_pairs(8, VOCABULARY)
    loss, grads = by_transformers(folder, pairs, Options())
    _, grads_of_fp32 = by_transformers(folder, pairs, Options(), dtype=torch.float32)
    usual, _ = worst_error(grads_of_fp32, grads)
    for ranks in (1, 2):
        found = fsdp_steps(folder, [pairs], ranks, batching="auto", fused_logprob=True)
        assert found["batching"] == "padded"
        assert found["losses"][0] == pytest.approx(loss, rel=1e-6)
        error, name = worst_error({name: found["grads"][name] for name in grads}, grads)
        assert error < 2 * usual, name


def test_bf16_keeps_the_form_of_batches(tmp_path):
    folder = make_model(tmp_path / "model", "gemma2")
    pairs = make_token_pairs(8, VOCABULARY)
    loss, _ = by_transformers(folder, pairs, Options())
    for ranks in (1, 2):
        found = fsdp_steps(folder, [pairs], ranks, batching="prefix_shared", bf16=True)
        assert found["losses"][0] == pytest.approx(loss, rel=0.03)


def test_what_a_model_cannot_is_refused_by_name(tmp_path):
    folder = make_model(tmp_path / "model", "qwen3_next")
    with pytest.raises(AssertionError, match="batching: packed: 3 of the 4 layers of Qwen3NextForCausalLM"):
        fsdp_steps(folder, [make_token_pairs(2, VOCABULARY)], batching="packed")


def test_layers_without_such_an_attention_are_not_divided_over_ranks(tmp_path):
    folder = make_model(tmp_path / "model", "qwen3_next")
    with pytest.raises(AssertionError, match="context_parallel_size: 3 of the 4 layers of Qwen3NextForCausalLM"):
        fsdp_steps(folder, [make_token_pairs(2, VOCABULARY)], 2, context_parallel_size=2)


# layers that hand no keyword down; dropout of hidden states and of scores; a mask that no layer uses; learned positions
OTHERS = {
    "stablelm": ("padded", {}),
    "gpt2": ("prefix_shared", {"resid_pdrop": 0.3, "attn_pdrop": 0.3}),
    "qwen2_moe": ("prefix_shared", {"num_experts": 4, "moe_intermediate_size": 48}),
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families(tmp_path, family):
    form, settings = OTHERS[family]
    folder = make_model(tmp_path / "model", family, **settings)
    pairs = make_token_pairs(8, VOCABULARY)
    found = fsdp_steps(folder, [pairs], 2, batching="auto")
    assert found["batching"] == form
    check_step(found, by_transformers(folder, pairs, Options()))


LAYOUTS = {
    "cp2": (2, {"context_parallel_size": 2}),
    "copies of shards": (4, {"fsdp_shard_size": 2}),
    "cp2 dp2": (4, {"context_parallel_size": 2, "fsdp_shard_size": 4}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["padded", "packed", "prefix_shared"])
def test_layouts(tmp_path, layout, form):
    folder = make_model(tmp_path / "model", "qwen3")
    pairs = make_token_pairs(8, VOCABULARY)
    ranks, options = LAYOUTS[layout]
    check_step(fsdp_steps(folder, [pairs], ranks, batching=form, **options), by_transformers(folder, pairs, Options()))


def test_the_layouts_have_every_axis_that_is_claimed():
    [claim] = [claim for claim in CLAIMS if (claim.key, claim.value) == ("backend", "fsdp")]
    config = Config(model_name_or_path="model", data_path="pairs", backend="fsdp", micro_batch_size=1)
    layouts = [make_layout(config.model_copy(update=keys), ranks) for ranks, keys in LAYOUTS.values()]
    assert frozenset().union(*(layout.axes for layout in layouts)) == claim.axes


SCHEDULES = {
    "two_pass, packed": {"pair_schedule": "two_pass", "batching": "packed"},
    "split": {"pair_schedule": "split"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    "selective": {"recompute_granularity": "selective", "batching": "prefix_shared"},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(tmp_path, name):
    folder = make_model(tmp_path / "model", "gemma2")
    pairs = make_token_pairs(8, VOCABULARY)
    expected = by_transformers(folder, pairs, Options())
    check_step(fsdp_steps(folder, [pairs], **SCHEDULES[name]), expected)


# two ranks do not divide the vocabulary, whose embedding may be the output layer too
@pytest.mark.parametrize(("family", "tied"), [("qwen3", False), ("qwen2", True), ("qwen3_moe", False)])
def test_the_backends_train_alike(tmp_path, family, tied):
    from tests.hf import make_checkpoint
    from tests.ranks.parity import engine_steps

    folder = make_checkpoint(tmp_path / "model", family, vocab_size=VOCABULARY, tied=tied)
    # the embedding of transformers gives the row of a padding id no gradient, whatever stands in the text
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}), encoding="utf-8")
    batches = [make_token_pairs(4, VOCABULARY, seed=seed) for seed in range(3)]
    training = {"lr": 1e-3, "adam_eps": 1e-5, "weight_decay": 0.1, "clip_grad": 0.5, "lr_decay_style": "constant"}
    ours = engine_steps(folder, batches, **training)
    theirs = fsdp_steps(folder, batches, ranks=2, **training)
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-5)
    assert theirs["norms"] == pytest.approx(ours["grad_norms"], rel=1e-5)
    shared = {name: value.double() for name, value in ours["params"].items() if name in theirs["params"]}
    assert "model.layers.0.self_attn.q_proj.weight" in shared
    error, name = worst_error({name: theirs["params"][name] for name in shared}, shared)
    assert error < 1e-5, name


@pytest.mark.parametrize("adapters", [{}, {"lora_r": 4}], ids=["all weights", "adapters"])
def test_a_checkpoint_goes_on_with_other_ranks(tmp_path, adapters):
    folder = make_model(tmp_path / "model", "mixtral")
    batches = [make_token_pairs(8, VOCABULARY, seed=seed) for seed in range(3)]
    training = {"lr": 1e-3, "adam_eps": 1e-5, **adapters}
    whole = fsdp_steps(folder, batches, **training)
    fsdp_steps(folder, batches[:2], ranks=2, save=str(tmp_path), **training)
    for ranks in (1, 4):
        rest = fsdp_steps(folder, batches[2:], ranks=ranks, load=str(tmp_path / "iter_0000002"), **training)
        assert rest["losses"] == pytest.approx(whole["losses"][2:], rel=1e-6)
        error, name = worst_error(rest["params"], {name: value.double() for name, value in whole["params"].items()})
        assert error < 1e-5, name
