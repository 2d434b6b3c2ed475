"""Whole models: one training step of the engine on the device against the dense oracle in fp64 on the host."""

from __future__ import annotations

import functools
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import SimpoError
from scripts.device_report.job import Job
from tests import oracle, oracle_adapters
from tests.hf import make_checkpoint
from tests.hf_adapters import make_adapter
from tests.oracle_model import CloseChoiceError
from tests.ranks.matrix import ADAM, GRADIENT, LOSS, LR, PARAMETER, SEED, global_batch
from tests.ranks.matrix_rows import EXPERT_FAMILIES, FAMILIES
from tests.ranks.parity import Run, make_config, train, worst_error

LOSS_OF_NARROW_SUMS = 1e-5
"""Bound of the loss where the device adds up in fp32, see ``Device.reduction_dtype``."""
BF16_LOSS, BF16_GRADIENT = 0.02, 0.125
"""Bounds of bf16: each of about 20 tensors of a layer is rounded to 2^-8, forward and backward, and the errors of two
layers add up in the gradients; the weights of the test are numbers that bf16 has."""
_FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_SEEDS = 20
_BUDGET = {"max_tokens_per_micro_batch": 90}
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TWO_EXPERTS = {"family": "mixtral", "experts": 2}
"""A token chooses both experts, so that no rounding changes the choice."""


@dataclass(frozen=True)
class Form:
    """A model and the keys of a step."""

    name: str
    family: str = "qwen2"
    keys: dict[str, Any] = field(default_factory=dict)
    adapters: bool = False
    dropout: float = 0.0
    bf16: bool = False


FORMS = (
    Form("biases, tied head"),
    Form("norms of queries and keys", "qwen3"),
    Form("sliding window", "mistral"),
    Form("soft caps, windows", "gemma2"),
    Form("latent attention, experts", "deepseek_v3"),
    Form("sinks, experts", "gpt_oss"),
    Form("experts", "qwen3_moe"),
    Form("packed", keys={"batching": "packed", **_BUDGET}),
    Form("prefix_shared", keys={"batching": "prefix_shared", **_BUDGET}),
    Form("prefix_shared, window", "mistral", {"batching": "prefix_shared", **_BUDGET}),
    Form("split", keys={"pair_schedule": "split"}),
    Form("two_pass", keys={"pair_schedule": "two_pass"}),
    Form("fused head", keys={"fused_logprob": True, "logprob_chunk_tokens": 7}),
    Form("full recompute", keys=_FULL),
    Form("adapters", adapters=True),
    Form("adapters, dropout", keys={"batching": "packed", **_BUDGET}, adapters=True, dropout=0.25),
    Form("bf16", "llama", bf16=True),
    Form("bf16, prefix_shared, fused head", "qwen3", {"batching": "prefix_shared", "fused_logprob": True}, bf16=True),
    Form("bf16, window", "mistral", {"batching": "packed"}, bf16=True),
    Form("bf16, both of two experts", "two experts", bf16=True),
    Form("scaled rotation", "llama"),
    Form("norms after blocks, windows", "gemma3_text"),
    Form("a part rotated, fused projections", "phi3"),
    Form("rotation of neighbours", "glm4"),
    Form("experts, window", "mixtral"),
    Form("shared experts", "glm4_moe"),
    Form(
        "packed, two_pass, fused head", keys={"batching": "packed", "pair_schedule": "two_pass", "fused_logprob": True}
    ),
    Form("selective recompute", keys={"recompute_granularity": "selective"}),
    Form("prefix_shared, sinks, experts", "gpt_oss", {"batching": "prefix_shared", **_BUDGET}),
    Form("prefix_shared, latent attention", "deepseek_v3", {"batching": "prefix_shared", **_BUDGET}),
    Form("prefix_shared, full recompute", "qwen3", {"batching": "prefix_shared", **_BUDGET, **_FULL}),
    Form("DPO with adapters", keys={"stage": "dpo"}, adapters=True),
)
"""In the order of their value, should the time end."""


def run(job: Job) -> None:
    """A row for each form and dtype."""
    device = job.open_device()
    from mindspeed_simpo.config.layout import Layout
    from mindspeed_simpo.parallel import initialize, seed_model_ranks

    groups = initialize(Layout(), device)
    seed_model_ranks(1)
    models = Models(job.folder, small=job.small)
    for form in FORMS:
        if not job.has_time_for(form.name):
            continue
        row = {"case": form.name, "model": form.family, "dtype": "bfloat16" if form.bf16 else "float32"}
        try:
            rows = errors_of(form, models, device, groups)
        except SimpoError as error:
            job.add(**row, refused=str(error), holds=None if _is_known_refusal(form, device) else False)
            continue
        except Exception:
            job.add(**row, crashed=traceback.format_exc()[-1500:], holds=False)
            continue
        for of, error, bound in rows:
            job.add(**row, of=of, error=error, bound=bound, holds=error <= bound)


def _is_known_refusal(form: Form, device: Device) -> bool:
    return device.name == "npu" and form.family == "gemma2"


def errors_of(form: Form, models: Models, device: Device, groups: Any) -> list[tuple[str, float, float]]:
    """What is compared, its error and its bound."""
    expected = None
    if groups.world.rank() == 0:  # the only rank that writes files
        expected = models.expected(form.family, form.keys.get("stage", "simpo"), form.adapters, form.dropout)
    seeds = [expected and expected[0]]
    if groups.world.size() > 1:
        dist.broadcast_object_list(seeds, 0, group=groups.control)
    seed = int(seeds[0] or 0)
    keys = {**ADAM, "lr": LR, "lr_decay_style": "constant", "bf16": form.bf16, "seed": SEED, **form.keys}
    if form.adapters:
        keys |= {"lora_r": models.RANK, "lora_alpha": models.ALPHA, "lora_dropout": form.dropout}
        keys |= {"lora_target_modules": list(_MODULES), "lora_load": str(models.adapters(form.family, seed))}
    sizes = {"micro_batch_size": 2, "global_batch_size": len(models.batch)}
    config = make_config(models.folder(form.family, seed), **sizes, **keys, device=device.name)
    found = train([models.batch], Run(), config, groups, device)
    if expected is None:  # rank 0 has the whole tensors too
        return []
    loss, _, grads, params = expected[1]
    tensors = {key: {name: torch.from_numpy(each) for name, each in found[key].items()} for key in ("grads", "params")}
    loss_error = abs(found["losses"][0] - loss) / abs(loss)
    gradient, of_gradient = worst_error(tensors["grads"], grads)
    if form.bf16:
        return [("loss", loss_error, BF16_LOSS), (f"gradient of {of_gradient}", gradient, BF16_GRADIENT)]
    parameter, of_parameter = worst_error(tensors["params"], params)
    narrow = device.reduction_dtype == torch.float32
    return [
        ("loss", loss_error, LOSS_OF_NARROW_SUMS if narrow else LOSS),
        (f"gradient of {of_gradient}", gradient, GRADIENT),
        (f"{of_parameter} after a step", parameter, PARAMETER),
    ]


class Models:
    """Small checkpoints whose weights are numbers of bf16, and what the oracle says of a step."""

    RANK, ALPHA = 4, 16.0

    def __init__(self, folder: Path, *, small: bool) -> None:
        self._root = folder
        heads, head_dim = (4, 16) if small else (8, 64)
        self._shape = {"hidden": 64 if small else 256, "heads": heads, "kv_heads": 2, "layers": 2, "std": 0.1}
        self._head_dim = head_dim
        self.batch = global_batch(4 if small else 8, 514)
        self.folder = functools.cache(self._make)
        self.adapters = functools.cache(self._make_adapters)
        self.expected = functools.cache(self._by_oracle)

    def _make(self, family: str, seed: int) -> Path:
        options = _TWO_EXPERTS if family == "two experts" else (FAMILIES | EXPERT_FAMILIES)[family]
        shape = {**self._shape, **options}
        if family != "deepseek_v3":
            shape["head_dim"] = self._head_dim
        folder = self._root / f"{family.replace(' ', '-')}-{seed}"
        if folder.exists():
            return folder
        return make_checkpoint(folder, vocab_size=514, dtype="bfloat16", seed=seed, **shape)

    def _make_adapters(self, family: str, seed: int) -> Path:
        folder = self._root / f"{family}-{seed}-adapters"
        return make_adapter(folder, self.folder(family, seed), _MODULES, r=self.RANK, alpha=self.ALPHA)

    def _by_oracle(
        self, family: str, stage: str, adapters: bool, dropout: float
    ) -> tuple[int, tuple[float, float, Any, Any]]:
        """Seed of the weights, and loss, gradient norm, gradients and parameters of the step.

        Weights for which rounding may choose another expert are not taken.
        """
        options = oracle.Options(stage=stage, **ADAM)
        pairs = [pair for pair in self.batch if pair]
        for seed in range(_SEEDS):
            folder = self.folder(family, seed)
            try:
                if adapters:
                    folders = folder, self.adapters(family, seed)
                    return seed, oracle_adapters.train_step(*folders, pairs, LR, options, None, dropout, SEED)
                loss, norm, grads, params = oracle.train_step(folder, pairs, LR, options)
                return seed, (loss, norm, grads, {name: param.detach() for name, param in params.items()})
            except CloseChoiceError:
                continue
        raise RuntimeError(f"{family}: rounding may choose another expert with each of {_SEEDS} seeds")
