"""Two steps against the dense fp64 oracle: what the matrix (test_topologies.py), one step of a row, does not have."""

import functools

import pytest

from tests import oracle
from tests.hf import make_checkpoint, make_token_pairs
from tests.ranks.parity import engine_steps, worst_error

LOSS, GRADIENT, PARAMETER = 1e-6, 1e-5, 2e-5
STEPS, PAIRS, LR = 2, 8, 1e-3
# Adam's step is about lr * g / (|g| + eps): an epsilon far above fp32's noise keeps it from scaling that noise up.
ADAM = {"adam_eps": 1e-5, "weight_decay": 0.1, "clip_grad": 0.5}

TP, PP, DP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size"
SHARDED = {"use_distributed_optimizer": True}
LAYOUTS = {
    "dp4 alone with its pairs": {DP: 4, "micro_batch_size": 1},
    "tp2 pp2 dp2": {TP: 2, PP: 2, DP: 2},
    "tp2 dp2 sharded optimizer": {TP: 2, DP: 2, **SHARDED},
    "micro batch of 1": {"micro_batch_size": 1},
    "micro batch of 4": {"micro_batch_size": 4, TP: 2},
    "selective recompute": {TP: 2, "recompute_granularity": "selective"},
}
# Vocabularies that neither 2 nor 4 divide, tied and untied, GQA and MHA; Llama's angles stretch from 32 tokens on.
MODELS = {
    "qwen2": {"family": "qwen2", "tied": True, "vocab_size": 517, "heads": 4, "kv_heads": 4},
    "llama": {"family": "llama", "rope_scaling": "llama3", "vocab_size": 513},
    "mistral": {"family": "mistral", "vocab_size": 514, "kv_heads": 1},
}
OBJECTIVES = {
    "smoothing": {"simpo_label_smoothing": 0.2, "simpo_beta": 4.0, "gamma_beta_ratio": 0.1},
    "dpo hinge": {"stage": "dpo", "dpo_loss_type": "hinge", "dpo_beta": 0.3},
    "dpo ipo": {"stage": "dpo", "dpo_loss_type": "ipo"},
    "dpo smoothing": {"stage": "dpo", "dpo_label_smoothing": 0.1, "pref_ftx": 0.2},
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder of a model by its name in MODELS; "reference" is another qwen2."""

    @functools.cache
    def make(name, dtype="float32"):
        options = MODELS["qwen2" if name == "reference" else name]
        folder = tmp_path_factory.mktemp(name)
        return make_checkpoint(folder, dtype=dtype, std=0.15, seed=int(name == "reference"), **options)

    return make


@functools.cache
def batches_of(model):
    vocab_size = MODELS[model]["vocab_size"]
    pairs = make_token_pairs(STEPS * PAIRS, vocab_size, max_prompt=40 if model == "llama" else 12)
    return [pairs[first : first + PAIRS] for first in range(0, len(pairs), PAIRS)]


@functools.cache
def expectation(folder, model, objective, ref_folder=None):
    """History, first gradients and final parameters by the oracle."""
    options = oracle.Options(**OBJECTIVES.get(objective, {}), **ADAM)
    batches = batches_of(model)
    grads = oracle.gradients(folder, batches[0], options, ref_folder)
    history, params = oracle.train(folder, batches, [LR] * STEPS, options, ref_folder)
    return history, grads, {name: param.detach() for name, param in params.items()}


def reference_sums(folder, model):
    params, config = oracle.load(folder)
    sums = []
    for pairs in batches_of(model):
        for prompt, *responses in pairs:
            sums.append([oracle.sequence_logprob(params, config, prompt, ids)[0].item() for ids in responses])
    return sums


def check(folder, model, objective="sigmoid", ref_folder=None, **layout):
    options = OBJECTIVES.get(objective, {})
    references = reference_sums(ref_folder or folder, model) if options.get("stage") == "dpo" else None
    history, grads, params = expectation(folder, model, objective, ref_folder)
    result = engine_steps(
        folder, batches_of(model), references, lr=LR, lr_decay_style="constant", **ADAM, **options, **layout
    )
    for (loss, grad_norm), engine_loss, engine_norm in zip(
        history, result["losses"], result["grad_norms"], strict=True
    ):
        assert engine_loss == pytest.approx(loss, rel=LOSS)
        assert engine_norm == pytest.approx(grad_norm, rel=GRADIENT)
    error, name = worst_error(result["grads"], grads)
    assert error < GRADIENT, f"gradient of {name}"
    error, name = worst_error(result["params"], params)
    assert error < PARAMETER, f"{name} after {STEPS} steps"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(checkpoints, layout):
    check(checkpoints("qwen2"), "qwen2", **LAYOUTS[layout])


@pytest.mark.newest_core
@pytest.mark.parametrize("model", ["llama", "mistral"])
def test_families(checkpoints, model):
    check(checkpoints(model), model, **{TP: 2, PP: 2})


@pytest.mark.newest_core
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives(checkpoints, objective):
    reference = checkpoints("reference") if objective.startswith("dpo") else None
    check(checkpoints("qwen2"), "qwen2", objective, reference, **{TP: 2, "micro_batch_size": 4})


@pytest.mark.parametrize("batching", ["padded", "prefix_shared"])
def test_bf16_computes_the_same_to_its_precision(checkpoints, batching):
    folder = checkpoints("qwen2", dtype="bfloat16")
    history, grads, params = expectation(folder, "qwen2", "sigmoid")
    result = engine_steps(
        folder,
        batches_of("qwen2"),
        lr=LR,
        lr_decay_style="constant",
        bf16=True,
        batching=batching,
        **ADAM,
        **{TP: 2, DP: 2},
    )
    assert result["losses"] == pytest.approx([loss for loss, _ in history], rel=0.02)
    assert result["grad_norms"] == pytest.approx([norm for _, norm in history], rel=0.05)
    assert worst_error(result["grads"], grads)[0] < 0.2
    assert worst_error(result["params"], params)[0] < 0.02
