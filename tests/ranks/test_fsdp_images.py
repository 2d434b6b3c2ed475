"""Images with ``backend: fsdp`` against transformers in fp64, one row at a time: loss and every gradient."""

import warnings

import pytest
import torch

from tests.images import make_image_model, make_image_pairs
from tests.oracle_objectives import Options
from tests.ranks.fsdp_images import by_transformers, check_model, count_features, fsdp_steps
from tests.ranks.launcher import run_ranks
from tests.ranks.parity import worst_error

pytestmark = pytest.mark.newest_core
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava")
VOCABULARY = 500


def check(found, expected, *, frozen):
    loss, grads = expected
    assert found["losses"][0] == pytest.approx(loss, rel=1e-6)
    if frozen:
        grads = {name: grad for name, grad in grads.items() if "language_model" in name or "lm_head" in name}
        assert all("language_model" in name or "lm_head" in name for name in found["grads"])
    # biases of keys have none, but for the rounding of softmax, which some towers compute in fp32 in any case
    zero = [name for name, grad in grads.items() if grad.norm() < 1e-6]
    for name in zero:
        assert found["grads"][name].norm() < 1e-5, name
    kept = {name: grad for name, grad in grads.items() if name not in zero}
    error, name = worst_error({name: found["grads"][name] for name in kept}, kept)
    assert error < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(tmp_path, family):
    folder = make_image_model(tmp_path / "model", family)
    pairs = make_image_pairs(8, VOCABULARY)
    expected = by_transformers(folder, pairs, Options())
    for form in ("padded", "packed", "prefix_shared"):
        found = fsdp_steps(folder, [pairs], batching=form, fused_logprob=form != "packed", **_sizes(form))
        assert found["batching"] == form
        check(found, expected, frozen=True)
    for frozen in (True, False):
        options = {"batching": "prefix_shared", "freeze_vision": frozen, **_sizes("prefix_shared")}
        check(fsdp_steps(folder, [pairs], ranks=2, **options), expected, frozen=frozen)


def _sizes(form):
    """Several micro-batches, some of them without images."""
    return {"seq_length": 256} | ({} if form == "padded" else {"max_tokens_per_micro_batch": 200})


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("form", ["padded", "packed", "prefix_shared"])
def test_context_parallel_ranks_have_the_images_of_their_tokens(tmp_path, form, frozen):
    folder = make_image_model(tmp_path / "model", "qwen3_vl", tied=True)
    pairs = make_image_pairs(8, VOCABULARY, seed=1, images=(2, 1, 0))
    expected = by_transformers(folder, pairs, Options())
    options = {"batching": form, "freeze_vision": frozen, "context_parallel_size": 2, **_sizes(form)}
    check(fsdp_steps(folder, [pairs], ranks=2 if frozen else 4, **options), expected, frozen=frozen)


SCHEDULES = {
    "two_pass": {"pair_schedule": "two_pass", "batching": "padded"},
    "two_pass, packed": {"pair_schedule": "two_pass", "batching": "packed"},
    "split": {"pair_schedule": "split", "batching": "padded"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "batching": "prefix_shared"},
}


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(tmp_path, name, frozen):
    folder = make_image_model(tmp_path / "model", "qwen2_5_vl")
    pairs = make_image_pairs(8, VOCABULARY, seed=2)
    expected = by_transformers(folder, pairs, Options())
    options = {"seq_length": 256, "freeze_vision": frozen, **SCHEDULES[name]}
    check(fsdp_steps(folder, [pairs], ranks=2, **options), expected, frozen=frozen)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_a_rank_without_any_image(tmp_path, frozen):
    """The second rank has pairs without images only: its vision tower computes a blank one."""
    folder = make_image_model(tmp_path / "model", "qwen3_vl")
    pairs = make_image_pairs(8, VOCABULARY, seed=3, images=(1, 0))
    expected = by_transformers(folder, pairs, Options())
    for form in ("padded", "prefix_shared"):
        options = {"batching": form, "freeze_vision": frozen, **_sizes(form)}
        check(fsdp_steps(folder, [pairs], ranks=2, **options), expected, frozen=frozen)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_bf16(tmp_path, family):
    folder = make_image_model(tmp_path / "model", family)
    pairs = make_image_pairs(8, VOCABULARY)
    loss, _ = by_transformers(folder, pairs, Options())
    options = {"batching": "prefix_shared", "bf16": True, "freeze_vision": False, **_sizes("prefix_shared")}
    assert fsdp_steps(folder, [pairs], ranks=2, **options)["losses"][0] == pytest.approx(loss, rel=0.03)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "down_proj"]], ids=["all-linear", "two modules"])
def test_adapters_are_in_the_decoder(tmp_path, ranks, modules):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    folder = make_image_model(tmp_path / "model", "qwen2_5_vl")
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj" if modules == "all-linear" else "q_proj|down_proj"
    torch.manual_seed(0)
    wanted = LoraConfig(r=3, lora_alpha=6, target_modules=rf".*language_model.*\.({names})", init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, to peft
        adapted = get_peft_model(AutoModelForImageTextToText.from_pretrained(folder), wanted)
    chosen = sorted({name.rpartition(".")[0] for name, _ in adapted.named_modules() if name.endswith(".lora_A")})
    wanted.target_modules = [name.removeprefix("base_model.model.") for name in chosen]
    adapted.save_pretrained(tmp_path / "adapter")
    pairs = make_image_pairs(4, VOCABULARY, seed=4)
    keys = {"lora_r": 3, "lora_alpha": 6, "lora_target_modules": modules, "lora_load": str(tmp_path / "adapter")}
    expected = by_transformers(folder, pairs, Options(), tmp_path / "adapter")
    for form in ("padded", "prefix_shared"):
        found = fsdp_steps(folder, [pairs], ranks, batching=form, **keys, **_sizes(form))
        assert found["grads"].keys() == expected[1].keys()
        check(found, expected, frozen=True)


def test_a_checkpoint_goes_on_with_other_ranks(tmp_path):
    folder = make_image_model(tmp_path / "model", "qwen3_vl")
    batches = [make_image_pairs(4, VOCABULARY, seed=seed) for seed in range(3)]
    training = {"lr": 1e-3, "adam_eps": 1e-5, "freeze_vision": False, "seq_length": 256}
    whole = fsdp_steps(folder, batches, **training)
    fsdp_steps(folder, batches[:2], ranks=2, save=str(tmp_path), **training)
    rest = fsdp_steps(folder, batches[2:], load=str(tmp_path / "iter_0000002"), **training)
    assert rest["losses"] == pytest.approx(whole["losses"][2:], rel=1e-6)
    error, name = worst_error(rest["params"], {name: value.double() for name, value in whole["params"].items()})
    assert error < 1e-5, name


@pytest.mark.parametrize("ranks", [1, 2])
def test_features_are_computed_once_for_a_micro_batch(tmp_path, ranks):
    """With a frozen tower, the passes of ``two_pass`` share the features, and so do both sequences of a pair."""
    folder = make_image_model(tmp_path / "model", "qwen2_5_vl")
    pairs = make_image_pairs(4, VOCABULARY, images=(1, 2))
    for counts in run_ranks(count_features, ranks, str(folder), pairs):
        # images of each micro-batch, by pair schedule
        assert counts == {"concat": [3, 3] if ranks == 1 else counts["concat"], "two_pass": counts["concat"]}
        assert sum(counts["concat"]) * ranks == pytest.approx(6, abs=ranks)


def test_what_attends_to_later_image_tokens_is_refused_by_name(tmp_path):
    folder = make_image_model(tmp_path / "gemma3", "gemma3")
    with pytest.raises(AssertionError, match="Gemma3ForConditionalGeneration has other hidden states at the tokens"):
        run_ranks(check_model, 1, str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_test_takes_the_models_that_are_exact(tmp_path, family):
    folder = make_image_model(tmp_path / "model", family)
    run_ranks(check_model, 2, str(folder))
