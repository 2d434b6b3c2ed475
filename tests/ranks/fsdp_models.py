"""Small models of transformers for ``backend: fsdp``, what it computes with them, and what transformers computes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.hf import write_random_weights
from tests.hf_adapters import quiet_peft
from tests.oracle_objectives import Options, Scores, score
from tests.ranks.launcher import run_ranks
from tests.ranks.parity import worst_error

VOCABULARY = 301
GRADIENT = 1e-5
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {"head_dim": 16}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
_SHARED = {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
_WINDOW = {"sliding_window": 5}
_LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}

FAMILIES = {
    "llama": {},
    "mistral": _HEADS | _WINDOW,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, **_WINDOW},
    "qwen2": {},
    "qwen3": _HEADS,
    "qwen3_moe": _HEADS | _EXPERTS | {"num_experts": 4},
    "gemma2": _HEADS | _WINDOW | {"query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0},
    "gemma3_text": _HEADS | _WINDOW | {"query_pre_attn_scalar": 16},
    "phi3": {},
    "glm4": _HEADS,
    "glm4_moe": _HEADS | _SHARED,
    "olmo2": {},
    "olmo3": _WINDOW,
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.25, "residual_multiplier": 0.5},
    "cohere2": _WINDOW | {"logit_scale": 0.25},
    "smollm3": {},
    "gpt_oss": _HEADS | _WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": _SHARED | _LATENT | {"num_key_value_heads": 4, "n_group": 2, "topk_group": 1},
    "ernie4_5": _HEADS,
    "qwen3_next": _HEADS
    | _EXPERTS
    | _LINEAR
    | {"num_experts": 4, "shared_expert_intermediate_size": 48, "linear_value_head_dim": 16},
}
"""Model type -> settings beside the sizes."""
PADDED_ONLY = ("qwen3_next",)
"""Those with layers that rows cannot be packed for."""


def make_model(folder, family, seed=0, **settings):
    """Write a model whose weights hide no mistake; without a tokenizer."""
    config = CONFIG_MAPPING[family](**{**_SIZES, **FAMILIES.get(family, {}), **settings})
    write_random_weights(folder, AutoModelForCausalLM.from_config(config, dtype=torch.float32), seed)
    return folder


def make_adapter(folder, base, modules="all-linear", parameters=None):
    """Write adapters of peft whose factors are both random; returns the keys of a run that loads them."""
    torch.manual_seed(0)
    targets = {"target_modules": modules, "target_parameters": parameters, "task_type": "CAUSAL_LM"}
    wanted = LoraConfig(r=3, lora_alpha=6, **targets)
    with quiet_peft():
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), wanted)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_" in name:
                    parameter.normal_(0, 0.1)
        adapted.save_pretrained(folder)
    names = (
        [modules] if isinstance(modules, str) else [*modules, *(name.rpartition(".")[2] for name in parameters or ())]
    )
    return {"lora_r": 3, "lora_alpha": 6, "lora_target_modules": names, "lora_load": str(folder)}


def by_transformers(folder, pairs, options: Options, adapter=None, dtype=torch.float64):
    """Loss and gradients of the model of transformers, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    if adapter is not None:
        with quiet_peft():
            model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
        model.to(dtype)
    scored = [[partial(_sum, model, prompt, response) for response in responses] for prompt, *responses in pairs]
    return loss_and_gradients(model, scored, options)


def loss_and_gradients(model, pairs, options: Options):
    """Mean loss, and gradients of the trained parameters, of pairs of functions that give a sum and a count."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    losses = []
    for responses in pairs:
        sums, counts = zip(*(score_one() for score_one in responses), strict=True)
        loss, _ = score(Scores(sums, counts, None, None), options)
        (loss / len(pairs)).backward()
        losses.append(loss.item())
    grads = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
    return sum(losses) / len(losses), grads


def _sum(model, prompt, response):
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
    predicted = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return predicted.gather(1, torch.tensor(response)[:, None]).sum(), len(response)


def fsdp_steps(folder, batches, ranks=1, **options):
    """Train on global batches; loss by step, gradients of the first and parameters after the last, of rank 0."""
    results = run_ranks(_steps, ranks, str(folder), batches, options)
    for key in ("losses", "norms"):
        assert all(result[key] == results[0][key] for result in results), f"ranks disagree on the {key}"
    for key in ("grads", "params"):
        results[0][key] = {name: torch.from_numpy(array) for name, array in results[0][key].items()}
    return results[0]


def check_step(found, expected):
    """Compare loss and gradients of :func:`fsdp_steps` with those of :func:`by_transformers`."""
    loss, grads = expected
    assert found["losses"][0] == pytest.approx(loss, rel=1e-6)
    # some parameters have no gradient: of experts that no token chose, or of keys' biases, which softmax cancels
    zero = [name for name, grad in grads.items() if grad.norm() < 1e-9]
    for name in zero:
        assert found["grads"][name].norm() < 1e-6, name
    kept = {name: grad for name, grad in grads.items() if name not in zero}
    error, name = worst_error({name: found["grads"][name] for name in kept}, kept)
    assert error < GRADIENT, name


def _steps(folder, batches, options, deal=None):
    from pathlib import Path

    from mindspeed_simpo.training import checkpoint
    from mindspeed_simpo.training.metrics import MetricSums
    from mindspeed_simpo.training.session import build_schedule
    from tests.ranks.parity import _micro_batches, build, make_config, start

    save, load = options.pop("save", None), options.pop("load", None)
    keys = {"backend": "fsdp", "global_batch_size": len(batches[0]), "micro_batch_size": 2, "seq_length": 64}
    config = make_config(folder, **keys | options)
    groups, device = start(config)
    backend, models, stepper = build(config, groups, device, 10)
    schedule = build_schedule(config, backend, groups, device, lambda: None, models, None)
    sums = MetricSums(config.objective, groups, device)
    first = 0
    if load is not None:
        checkpoint.load(Path(load), models, stepper, groups, device)
        first = checkpoint.read_state(Path(load)).step
    result = {"losses": [], "norms": [], "batching": backend.config.batching_in_use}
    for step, pairs in enumerate(batches):
        stepper.zero_grad()
        micro_batches = (deal or _micro_batches)(pairs, step * len(pairs), backend.config, groups)
        scored = schedule.forward_backward(micro_batches, sum(pair is not None for pair in pairs), first + step)
        if step == 0:
            result["grads"] = _gathered(models[0], lambda parameter: parameter.grad)
        norm = stepper.squared_norm()
        stepper.update(norm)
        result["losses"].append(sums.totals(sums.reduce(sums.local(scored))).means["loss"])
        result["norms"].append(norm.item() ** 0.5)
    if save is not None:
        state = checkpoint.TrainingState(
            step=first + len(batches), consumed_pairs=0, data_fingerprint="", running=None, config=config.model_dump()
        )
        checkpoint.CheckpointWriter(Path(save), groups, device).save(state, models, stepper)
    result["params"] = _gathered(models[0], lambda parameter: parameter)
    return result


def _gathered(policy, value):
    """Whole tensors of the trained parameters, by the names of transformers, or of peft."""
    from torch.distributed.tensor import DTensor

    found = {}
    for name, parameter in policy.causal.named_parameters():
        tensor = value(parameter) if parameter.requires_grad else None
        if tensor is None:
            continue
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        known = f"base_model.model.{name}" if ".lora_" in name else name
        found[known] = whole.detach().clone().numpy()
    return found
