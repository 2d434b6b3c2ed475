"""Adapters on ranks: what is read is written back bit by bit, new ones start alike, checkpoints cross layouts."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mindspeed_simpo.model.adapters import projections
from mindspeed_simpo.model.hf_config import read_description
from tests import hf, hf_adapters, oracle_adapters, oracle_model
from tests.ranks.launcher import run_ranks
from tests.ranks.model_helpers import engine_model, make_checkpoint, make_tokenizer
from tests.ranks.parity import engine_steps, worst_error

MODULES = {
    "qwen2": ["k_proj", "v_proj", "o_proj", "up_proj"],
    "phi3": ["qkv_proj", "down_proj"],
    "glm4": ["q_proj", "gate_up_proj"],
    "qwen3_moe": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "mixtral": ["o_proj", "w1", "w2", "w3"],
    "glm4_moe": ["k_proj", "gate_proj", "up_proj", "down_proj"],
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt_oss": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
FILE = "adapter_model.safetensors"


def _written_back(folder, layout, options, output, merged=None):
    """Loads the configured adapters and exports them, and the model with them; an error's text."""
    from mindspeed_simpo.errors import ModelError
    from mindspeed_simpo.model.export_folder import Companions
    from mindspeed_simpo.model.megatron.export import export_adapters, export_hf

    try:
        description, groups, models = engine_model(folder, layout, **options)
        beside = Companions(Path(folder), make_tokenizer())
        export_adapters(models, description, groups, beside=beside, base=folder, output=Path(output))
        if merged is not None:
            export_hf(models, description, groups, beside=beside, output=Path(merged))
    except ModelError as error:
        return str(error)
    return None


def keys(modules, **others):
    return {"lora_r": 4, "lora_alpha": 8.0, "lora_target_modules": modules, **others}


@pytest.mark.newest_core
@pytest.mark.parametrize(
    ("family", "layout", "dtype"),
    [
        ("qwen2", (4, 1, 1), "float32"),
        ("phi3", (2, 2, 1), "bfloat16"),
        ("glm4", (2, 1, 2), "float32"),
        ("gpt_oss", (4, 1, 1), "float32"),
    ],
)
def test_what_peft_wrote_is_written_back_bit_by_bit(tmp_path, family, layout, dtype):
    folder = make_checkpoint(tmp_path / "base", family)
    adapter = hf_adapters.make_adapter(tmp_path / "adapter", folder, MODULES[family], dtype=dtype)
    options = keys(MODULES[family], lora_load=str(adapter), bf16=dtype == "bfloat16")
    ranks = layout[0] * layout[1] * layout[2]
    assert run_ranks(_written_back, ranks, folder, layout, options, str(tmp_path / "out")) == [None] * ranks
    read, written = (load_file(path / FILE) for path in (adapter, tmp_path / "out"))
    assert read.keys() == written.keys()
    for name, tensor in read.items():
        assert written[name].dtype == torch.float32
        assert torch.equal(written[name], tensor.float()), name


@pytest.mark.newest_core
@pytest.mark.parametrize(
    ("family", "layout", "divided"),
    [
        ("qwen3_moe", (2, 1, 2), {EP: 2, ETP: 2}),
        ("mixtral", (2, 2, 1), {}),
        ("glm4_moe", (2, 1, 1), {EP: 2, ETP: 1}),
        ("deepseek_v3", (2, 2, 1), {EP: 2, ETP: 1}),
    ],
)
def test_adapters_of_experts_are_written_back_and_peft_computes_the_same(tmp_path, family, layout, divided):
    shape = {} if family in ("mixtral", "deepseek_v3") else {"head_dim": 16}
    folder = str(hf.make_checkpoint(tmp_path / "base", family, **shape))
    adapter = hf_adapters.make_adapter(tmp_path / "adapter", folder, MODULES[family])
    output, merged = tmp_path / "out", tmp_path / "merged"
    options = keys(MODULES[family], lora_load=str(adapter), **divided)
    ranks = layout[0] * layout[1] * layout[2]
    assert run_ranks(_written_back, ranks, folder, layout, options, str(output), str(merged)) == [None] * ranks
    read, written = (load_file(path / FILE) for path in (adapter, output))
    assert read.keys() == written.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in read.items())

    tokens = list(range(3, 30))
    params, config = oracle_model.load(folder)
    expected = oracle_model.logits(
        oracle_adapters.adapted(params, *oracle_adapters.load_adapters(adapter)), config, tokens
    )
    with hf_adapters.quiet_peft(), torch.no_grad():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), output)
        [found] = model(torch.tensor([tokens])).logits
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    found = oracle_model.logits(oracle_model.load(merged)[0], config, tokens)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    # what peft itself writes: one pair of factors for all experts of a layer
    model.save_pretrained(tmp_path / "again")
    options["lora_load"] = str(tmp_path / "again")
    for message in run_ranks(_written_back, ranks, folder, layout, options, str(output)):
        assert "target_parameters has down_proj, gate_up_proj: peft makes such factors for all experts" in message


@pytest.mark.newest_core
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_all_linear_of_attention_is_that_of_peft(tmp_path, family):
    folder = hf.make_checkpoint(tmp_path, family)
    with hf_adapters.quiet_peft():
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules="all-linear")
        )
    theirs = {name.rsplit(".", 1)[-1] for name in model.targeted_module_names if "self_attn" in name}
    mlp = {"gate_proj", "up_proj", "down_proj"}
    assert {*projections(read_description(str(folder)))} - mlp == theirs


@pytest.mark.newest_core
def test_new_adapters_are_those_of_peft_and_the_same_at_every_layout(tmp_path):
    folder, found = make_checkpoint(tmp_path / "base", "qwen2"), []
    for layout in ((1, 1, 1), (4, 1, 1)):
        output = tmp_path / str(layout[0])
        run_ranks(_written_back, layout[0], folder, layout, keys(MODULES["qwen2"]), str(output))
        found.append(load_file(output / FILE))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    for name, tensor in found[0].items():
        if "lora_B" in name:
            assert not tensor.any()
        else:
            bound = tensor.shape[1] ** -0.5
            assert 0.8 * bound < tensor.abs().max() <= bound
            assert tensor.std() == pytest.approx(bound / 3**0.5, rel=0.2)


@pytest.mark.newest_core
def test_an_adapter_of_another_model_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "base", "qwen2")
    wider = make_checkpoint(tmp_path / "wider", "qwen2", intermediate_size=128)
    deeper = make_checkpoint(tmp_path / "deeper", "qwen2", num_hidden_layers=3)
    arguments = (1, 1, 1), str(tmp_path / "out")
    for base, words in ((wider, ("lora_B.weight has shape [128, 4]", "[96, 4]")), (deeper, ("also holds", "layers.2"))):
        adapter = hf_adapters.make_adapter(f"{base}-adapter", base, ["up_proj"])
        options = keys(["up_proj"], lora_load=str(adapter))
        [message] = run_ranks(_written_back, 1, folder, arguments[0], options, arguments[1])
        assert all(word in message for word in words), message


TRAINING = {"lr": 1e-2, "lr_decay_style": "constant", "weight_decay": 0.1, "adam_eps": 1e-4}
SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {
    "one": {},
    "tp2_pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "cp2_dp2_sharded": {"context_parallel_size": 2, "data_parallel_size": 2, "use_distributed_optimizer": True},
    "tp4": SEQUENCE | {"tensor_model_parallel_size": 4, "use_distributed_optimizer": True},
}


EXPERT_LAYOUTS = {
    "one": {},
    "ep2_etp1": {"tensor_model_parallel_size": 2, EP: 2, ETP: 1},
    "ep2_etp2_sharded": {"data_parallel_size": 4, EP: 2, ETP: 2, "use_distributed_optimizer": True},
    "etp2": {"data_parallel_size": 2, ETP: 2},
}


@pytest.mark.parametrize(
    ("family", "modules", "layouts"),
    [
        ("qwen3", ["q_proj", "v_proj", "o_proj", "gate_proj"], LAYOUTS),
        ("qwen3_moe", ["q_proj", "gate_proj", "up_proj", "down_proj"], EXPERT_LAYOUTS),
    ],
)
def test_a_checkpoint_of_adapters_crosses_layouts(tmp_path, family, modules, layouts):
    shape = {"layers": 4, "vocab_size": 301, "heads": 6, "kv_heads": 2, "head_dim": 16}
    folder = hf.make_checkpoint(tmp_path / "base", family, tied=True, **shape)
    pairs = hf.make_token_pairs(16, vocab_size=301)
    batches = [pairs[:8], pairs[8:]]
    adapters = keys(modules, **TRAINING)
    whole = engine_steps(folder, batches * 2, **adapters)
    _, *names = layouts
    for written, read in zip(names, (*names[1:], "one"), strict=True):
        saved = tmp_path / written
        first = engine_steps(folder, batches, save=saved, **adapters, **layouts[written])
        second = engine_steps(folder, batches, load=saved / "iter_0000002", **adapters, **layouts[read])
        assert first["losses"] + second["losses"] == pytest.approx(whole["losses"], rel=1e-6)
        error, name = worst_error(second["params"], {name: tensor.double() for name, tensor in whole["params"].items()})
        assert error < 1e-5, name


@pytest.mark.parametrize("batching", ["packed", "prefix_shared"])
def test_dropout_goes_on_at_another_layout_and_form_of_batches(tmp_path, batching):
    folder = hf.make_checkpoint(tmp_path / "base", "qwen2", vocab_size=301)
    pairs = hf.make_token_pairs(16, vocab_size=301)
    batches = [pairs[:8], pairs[8:]]
    # an epsilon far above the noise of fp32 keeps Adam from scaling that noise up
    options = keys(["q_proj", "v_proj", "down_proj"], **TRAINING | {"adam_eps": 1e-2}, lora_dropout=0.3)
    whole = engine_steps(folder, batches * 2, **options)
    plain = engine_steps(folder, batches[:1], **options | {"lora_dropout": 0.0})
    first = engine_steps(folder, batches, save=tmp_path, **options, **LAYOUTS["tp2_pp2"], batching=batching)
    second = engine_steps(folder, batches, load=tmp_path / "iter_0000002", **options, **LAYOUTS["cp2_dp2_sharded"])
    assert first["losses"] + second["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    error, name = worst_error(second["params"], {name: tensor.double() for name, tensor in whole["params"].items()})
    assert error < 1e-5, name
    # the product of new factors is zero with and without dropout; their gradients are not the same
    assert plain["losses"] == pytest.approx(whole["losses"][:1], rel=1e-6)
    name = next(name for name in plain["grads"] if "lora_B" in name)
    assert not torch.allclose(plain["grads"][name], whole["grads"][name], rtol=0.1)


def _evaluated(folder, pairs, options):
    """The losses of an evaluation, by rate of dropout."""
    from scripts.engine import build_engine
    from tests.ranks.parity import _micro_batches, make_config, start

    found, started = [], None
    for rate in (0.0, 0.5):
        config = make_config(folder, lora_dropout=rate, global_batch_size=len(pairs), **options)
        groups, device = started = started or start(config)
        _, schedule = build_engine(config, device, groups)
        scored = schedule.forward(_micro_batches(pairs, 0, config, groups))
        found.append([each.output.loss.tolist() for each in scored])
    return found


@pytest.mark.newest_core
def test_an_evaluation_drops_nothing(tmp_path):
    folder = hf.make_checkpoint(tmp_path / "base", "qwen2", vocab_size=301)
    adapter = hf_adapters.make_adapter(tmp_path / "adapter", folder, MODULES["qwen2"])
    options = keys(MODULES["qwen2"], lora_load=str(adapter))
    [[plain, dropped]] = run_ranks(_evaluated, 1, str(folder), hf.make_token_pairs(4, vocab_size=301), options)
    assert plain == dropped


def _kinds_of_parameters(folder, options):
    """By kind, the dtypes of weights, of factors, of their main parameters and of their gradients."""
    from mindspeed_simpo.model.megatron.weights import unwrap
    from mindspeed_simpo.training.checkpoint.shards import optimizer_shard
    from tests.ranks.parity import build, make_config, start

    config = make_config(folder, **options)
    _, models, stepper = build(config, *start(config), 1)
    [model] = map(unwrap, models)
    weights, factors = (
        [model.get_parameter(slot.parameter) for slot in part] for part in (model.slots, model.adapter_slots)
    )
    mains = [optimizer_shard(stepper.optimizer, factor).main for factor in factors]
    kinds = weights, factors, mains, [factor.main_grad for factor in factors]
    separate = [main for main in mains if main.untyped_storage().data_ptr() not in _storages(factors)]
    return [sorted({str(each.dtype) for each in kind}) for kind in kinds], len(separate)


def _storages(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("family", ["qwen2", "glm4_moe"])
@pytest.mark.parametrize("sharded", [False, True])
def test_factors_are_fp32_in_a_bf16_model_and_have_no_other_main_parameters(tmp_path, family, sharded):
    shape = {"head_dim": 16} if family == "glm4_moe" else {}
    folder = str(hf.make_checkpoint(tmp_path / "base", family, **shape))
    options = keys(
        ["o_proj", "gate_proj", "up_proj"], bf16=True, use_distributed_optimizer=sharded, global_batch_size=8
    )
    fp32, weights = ["torch.float32"], ["torch.bfloat16"] + ["torch.float32"] * (family == "glm4_moe")
    assert run_ranks(_kinds_of_parameters, 1, folder, options) == [([weights, fp32, fp32, fp32], 0)]


@pytest.mark.parametrize(
    ("family", "sharded", "divided"),
    [("qwen2", False, SEQUENCE), ("qwen2", True, {}), ("mixtral", True, {EP: 2}), ("mixtral", False, {ETP: 2})],
)
def test_bf16_goes_on_from_a_checkpoint_bit_by_bit(tmp_path, family, sharded, divided):
    folder = hf.make_checkpoint(tmp_path / "base", family, vocab_size=301)
    pairs = hf.make_token_pairs(8, vocab_size=301)
    modules = ["q_proj", *({"qwen2": ["down_proj"], "mixtral": ["w1", "w2", "w3"]}[family])]
    options = keys(modules, **TRAINING, bf16=True, data_parallel_size=2, use_distributed_optimizer=sharded, **divided)
    whole = engine_steps(folder, [pairs] * 4, **options)
    engine_steps(folder, [pairs] * 2, save=tmp_path / "saved", **options)
    second = engine_steps(folder, [pairs] * 2, load=tmp_path / "saved" / "iter_0000002", **options)
    assert second["losses"] == whole["losses"][2:]
    assert all(torch.equal(second["params"][name], value) for name, value in whole["params"].items())
    stored = load_file(tmp_path / "saved" / "iter_0000002" / "rank_00000.safetensors")
    main = [tensor for name, tensor in stored.items() if name.startswith("parameter|")]
    assert main
    assert all(tensor.dtype == torch.float32 for tensor in main)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in main)
