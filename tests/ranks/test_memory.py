"""``check``'s estimate of the activations against the counted bytes that a step saves and allocates."""

import pytest

from tests.hf import Pairs, make_checkpoint, make_token_pairs
from tests.ranks import model_helpers
from tests.ranks.launcher import run_ranks

pytestmark = pytest.mark.newest_core

PAIRS = 8
CLOSE, PROMISED = 0.1, 0.2
"""Relative."""


def _counted_on_rank(folder, token_pairs, options, modes):
    """By mode: counted stored bytes, counted peak, estimate; of this rank's stage."""
    import torch.distributed as dist
    from megatron.core import tensor_parallel

    from mindspeed_simpo.batch import TokenizedPair
    from mindspeed_simpo.config.config import Config
    from mindspeed_simpo.config.validation import make_layout
    from mindspeed_simpo.data.batching import Batching
    from mindspeed_simpo.data.largest import largest_pass
    from mindspeed_simpo.data.loader import PairLoader
    from mindspeed_simpo.device import open_device
    from mindspeed_simpo.model.hf_config import read_description
    from mindspeed_simpo.parallel import initialize
    from mindspeed_simpo.training.memory import estimate_memory
    from scripts.engine import build_engine
    from scripts.tensor_bytes import PeakBytes, StoredBytes

    pairs = Pairs(TokenizedPair(*pair, source="") for pair in token_pairs)
    device, groups, found = open_device("cpu"), None, []
    for mode in modes:
        values = {"seq_length": 256, "global_batch_size": PAIRS, **options, **mode}
        config = Config(model_name_or_path=folder, data_path="unused", **values)
        layout = make_layout(config, dist.get_world_size())
        if groups is None:
            groups = initialize(layout, device)
            tensor_parallel.model_parallel_cuda_manual_seed(1)
        models, schedule = build_engine(config, device, groups)
        loader = PairLoader(
            pairs,
            seed=config.seed,
            global_batch_size=PAIRS,
            batching=Batching.of(config),
            data_parallel_rank=0,
            data_parallel_size=1,
        )
        micro_batches = loader.train_step(0)
        parameters = [parameter for model in models for parameter in model.parameters()]
        present = parameters + [parameter.main_grad for parameter in parameters if parameter.requires_grad]
        with StoredBytes(parameters) as stored, PeakBytes(present) as made:
            schedule.forward_backward(micro_batches, PAIRS)
        largest = largest_pass(pairs.lengths, config, Batching.of(config), layout)
        estimate = estimate_memory(read_description(folder), config, layout, largest, "cpu")[groups.pipeline.rank()]
        found.append((stored.peak, made.peak, estimate.activations, estimate.head, estimate.backward))
    return found


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}
SELECTIVE = {"recompute_granularity": "selective"}
PADDED = {"batching": "padded", "micro_batch_size": 2}
BUDGET = {"max_tokens_per_micro_batch": 600}
MODES = [
    {"batching": "prefix_shared", **BUDGET},
    {"batching": "packed", **BUDGET},
    {"batching": "packed", "pair_schedule": "two_pass", **BUDGET},
    PADDED,
    {**PADDED, "pair_schedule": "two_pass"},
    {"batching": "prefix_shared", **BUDGET, **FULL},
    {**PADDED, **BLOCK},
    {"batching": "packed", **BUDGET, **SELECTIVE},
    {"batching": "prefix_shared", **BUDGET, "bf16": True},
]
MODELS = {
    "llama": {"hidden": 64, "layers": 4, "heads": 8, "kv_heads": 8, "intermediate": 96, "vocab_size": 500},
    "qwen2": {"hidden": 96, "layers": 4, "heads": 4, "kv_heads": 2, "intermediate": 320, "vocab_size": 2000},
    "qwen3": {"hidden": 64, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "intermediate": 160},
}
EXPERT_MODELS = {
    "qwen3_moe": {"hidden": 96, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "intermediate": 160},
    "mixtral": {"hidden": 64, "layers": 4, "heads": 4, "kv_heads": 2, "intermediate": 160},
    "glm4_moe": {"hidden": 96, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "intermediate": 160},
    "deepseek_v3": {"hidden": 96, "layers": 4, "heads": 8, "intermediate": 160},
    "gpt_oss": {
        "hidden": 96,
        "layers": 4,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 32,
        "intermediate": 160,
        "window": 32,
    },
}


def check(found, modes, allowed=CLOSE):
    for mode, (stored, made, activations, head, backward) in zip(modes, found, strict=True):
        assert activations == pytest.approx(stored, rel=allowed), f"stored in {mode}"
        assert activations + max(head, backward) == pytest.approx(made, rel=allowed), f"made in {mode}"


@pytest.mark.parametrize("family", MODELS)
def test_one_rank(tmp_path, family):
    folder = make_checkpoint(tmp_path, family, **MODELS[family])
    pairs = make_token_pairs(PAIRS, 500, seed=5, max_prompt=100, max_response=100)
    [found] = run_ranks(_counted_on_rank, 1, str(folder), pairs, {}, MODES)
    check(found, MODES)


@pytest.mark.parametrize("family", EXPERT_MODELS)
def test_experts(tmp_path, family):
    folder = make_checkpoint(tmp_path, family, **EXPERT_MODELS[family])
    pairs = make_token_pairs(PAIRS, 500, seed=5, max_prompt=100, max_response=100)
    modes = [MODES[0], MODES[3], MODES[5], MODES[8]]
    [found] = run_ranks(_counted_on_rank, 1, str(folder), pairs, {}, modes)
    check(found, modes, PROMISED)


VARIED = {
    "gemma2": {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3_text": {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "glm4": {},
    "phi3": {"num_key_value_heads": 4},
}


@pytest.mark.parametrize("family", VARIED)
def test_layers_that_differ(tmp_path, family):
    """Windows, soft caps, norms after a block: each layer counts for itself."""
    shape = {"num_hidden_layers": 4, "vocab_size": 512, "intermediate_size": 160}
    folder = model_helpers.make_checkpoint(tmp_path, family, **shape, **VARIED[family])
    pairs = make_token_pairs(PAIRS, 500, seed=5, max_prompt=100, max_response=100)
    [found] = run_ranks(_counted_on_rank, 1, folder, pairs, {}, [MODES[0], MODES[3]])
    check(found, [MODES[0], MODES[3]], PROMISED)


def test_more_ranks_than_key_value_heads(tmp_path):
    shape = {"num_hidden_layers": 4, "vocab_size": 512, "intermediate_size": 160}
    folder = model_helpers.make_checkpoint(tmp_path, "glm4", **shape)
    pairs = make_token_pairs(PAIRS, 500, seed=5, max_prompt=100, max_response=100)
    for found in run_ranks(_counted_on_rank, 4, folder, pairs, {"tensor_model_parallel_size": 4}, [MODES[3]]):
        check(found, [MODES[3]], PROMISED)


def test_whole_logits_are_the_heads_share(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen2", **MODELS["qwen2"])
    pairs = make_token_pairs(PAIRS, 500, seed=5, max_prompt=100, max_response=100)
    mode = {**PADDED, "fused_logprob": False}
    [[(stored, made, activations, head, backward)]] = run_ranks(_counted_on_rank, 1, str(folder), pairs, {}, [mode])
    assert activations < stored < activations + head
    assert activations + max(head, backward) == pytest.approx(made, rel=CLOSE)


ADAPTERS = {"all": "all-linear", "some": ["q_proj", "v_proj", "down_proj"]}


@pytest.mark.parametrize("modules", ADAPTERS)
def test_adapters(tmp_path, modules):
    folder = make_checkpoint(tmp_path, "qwen2", **MODELS["qwen2"])
    pairs = make_token_pairs(PAIRS, 500, seed=5, max_prompt=100, max_response=100)
    options = {"lora_r": 8, "lora_target_modules": ADAPTERS[modules]}
    modes = [*MODES[:4], MODES[5], *MODES[7:]]
    [found] = run_ranks(_counted_on_rank, 1, str(folder), pairs, options, modes)
    check(found[:-1], modes[:-1])
    check(found[-1:], modes[-1:], PROMISED)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_dropout_keeps_no_masks_and_no_masked_inputs(tmp_path, family):
    folder = make_checkpoint(tmp_path, family, **EXPERT_MODELS[family])
    pairs = make_token_pairs(PAIRS, 500, seed=5, max_prompt=100, max_response=100)
    options, modes = {"lora_r": 8, "lora_dropout": 0.1}, [MODES[0], MODES[3], MODES[5], MODES[8]]
    [found] = run_ranks(_counted_on_rank, 1, str(folder), pairs, options, modes)
    check(found, modes, PROMISED)


@pytest.mark.parametrize("modules", [["v_proj"], ["gate_proj", "up_proj"], "all-linear"], ids=str)
def test_adapters_of_experts(tmp_path, modules):
    folder = make_checkpoint(tmp_path, "glm4_moe", **EXPERT_MODELS["glm4_moe"])
    pairs = make_token_pairs(PAIRS, 500, seed=5, max_prompt=100, max_response=100)
    options, modes = {"lora_r": 8, "lora_target_modules": modules}, [MODES[0], MODES[3], MODES[5], MODES[8]]
    [found] = run_ranks(_counted_on_rank, 1, str(folder), pairs, options, modes)
    check(found, modes, PROMISED)


LATENT_LAYOUT = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LATENT_LAYOUT |= {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "modules", [["q_a_proj", "kv_a_proj_with_mqa"], ["q_b_proj", "kv_b_proj"], "all-linear"], ids=str
)
def test_adapters_of_latent_attention(tmp_path, modules, ranks):
    folder = make_checkpoint(tmp_path, "deepseek_v3", **EXPERT_MODELS["deepseek_v3"])
    pairs = make_token_pairs(PAIRS, 500, seed=5, max_prompt=100, max_response=100)
    options, modes = {"lora_r": 32, "lora_target_modules": modules}, [MODES[0], MODES[3], MODES[8]]
    layout = LATENT_LAYOUT if ranks > 1 else {}
    for found in run_ranks(_counted_on_rank, ranks, str(folder), pairs, options | layout, modes):
        check(found, modes)


def _held_on_rank(folder, options):
    """Counted and estimated bytes of parameters, gradients and Adam's state."""
    import torch
    import torch.distributed as dist

    from mindspeed_simpo.config.validation import make_layout
    from mindspeed_simpo.data.largest import LargestPass, PassShape
    from mindspeed_simpo.training.memory import estimate_memory
    from tests.ranks.parity import build, make_config, start

    config = make_config(folder, **options)
    groups, device = start(config)
    backend, models, stepper = build(config, groups, device, 1)
    stepper.squared_norm()
    stepper.update(torch.zeros(1))
    buffers = [buffer for model in models for buffer in (*model.buffers, *model.expert_parallel_buffers)]
    gradients = sum(buffer.grad_data.numel() * 4 for buffer in buffers)
    parameters = sum(each.numel() * each.itemsize for model in models for each in model.parameters())
    optimizers = getattr(stepper.optimizer, "chained_optimizers", [stepper.optimizer])
    states = [state for each in optimizers for state in each.optimizer.state.values()]
    held = sum(state[kind].numel() * 4 for state in states for kind in ("exp_avg", "exp_avg_sq"))
    assert not any("float16" in str(state["exp_avg"].dtype) for state in states)
    layout = make_layout(config, dist.get_world_size())
    largest = LargestPass(PassShape(tokens=8, rows=2, scored=4), (8,), 1)
    estimate = estimate_memory(backend.description, config, layout, largest, "cpu")[groups.pipeline.rank()]
    return (parameters, gradients, held), (estimate.parameters, estimate.gradients, estimate.optimizer)


@pytest.mark.parametrize(
    ("ranks", "family", "keys"),
    [
        (1, "qwen2", {}),
        (2, "qwen2", {"use_distributed_optimizer": True}),
        (1, "qwen2", {"bf16": True}),
        (4, "qwen3_moe", {"use_distributed_optimizer": True, "expert_tensor_parallel_size": 2}),
    ],
)
def test_frozen_weights_have_no_gradient_and_no_state(tmp_path, ranks, family, keys):
    folder = make_checkpoint(tmp_path, family, **(MODELS | EXPERT_MODELS)[family])
    options = {"lora_r": 8, "global_batch_size": 8, **keys}
    for counted, estimated in run_ranks(_held_on_rank, ranks, str(folder), options):
        assert counted[0] == estimated[0]
        assert counted[1:] == pytest.approx(estimated[1:], rel=0.02)  # buffers are padded
        assert estimated[1] < estimated[0] / 4


LAYOUTS = {
    "TP 2, SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "TP 2": {"tensor_model_parallel_size": 2},
    "PP 2": {"pipeline_model_parallel_size": 2},
    "CP 2": {"context_parallel_size": 2},
    "PP 2, VPP": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
}


@pytest.mark.parametrize(("layout", "family"), [*((layout, "qwen2") for layout in LAYOUTS), ("CP 2", "llama")])
def test_every_axis(tmp_path, layout, family):
    folder = make_checkpoint(tmp_path, family, **MODELS[family])
    pairs = make_token_pairs(PAIRS, 500, seed=5, max_prompt=100, max_response=100)
    options = LAYOUTS[layout]
    modes = [MODES[0], MODES[2], MODES[3]] if family == "qwen2" else [MODES[3]]
    for found in run_ranks(_counted_on_rank, 2, str(folder), pairs, options, modes):
        check(found, modes, PROMISED)


EXPERT_LAYOUTS = {
    "TP 2": {"tensor_model_parallel_size": 2},
    "TP 2, SP, EP 2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
}


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_experts_divided(tmp_path, layout):
    """The ranks' estimates hold on average: how many tokens choose the experts of each is for the router to say."""
    folder = make_checkpoint(tmp_path, "qwen3_moe", **EXPERT_MODELS["qwen3_moe"])
    pairs = make_token_pairs(PAIRS, 500, seed=5, max_prompt=100, max_response=100)
    ranks = run_ranks(_counted_on_rank, 2, str(folder), pairs, EXPERT_LAYOUTS[layout], [MODES[0]])
    stored, made, activations, head, backward = (
        sum(values) / 2 for values in zip(*(found[0] for found in ranks), strict=True)
    )
    assert activations == pytest.approx(stored, rel=PROMISED)
    assert activations + max(head, backward) == pytest.approx(made, rel=PROMISED)
