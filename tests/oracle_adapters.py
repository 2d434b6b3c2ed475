"""Training of adapters (LoRA), dense and in fp64, in the words of :mod:`tests.oracle`; the base weights are constant.

``adapters`` is always ``{name in the file of peft, without its prefix: fp64 tensor}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.oracle import AdamW, Pair, grad_norm
from tests.oracle_model import Params, load, sequence_logprob
from tests.oracle_objectives import STAGES, Options, Running, Scores, score

_PREFIX = "base_model.model."


def load_adapters(folder: str | Path) -> tuple[Params, float]:
    """The factors in a folder of peft as fp64 leaves that require a gradient, and ``lora_alpha / r``."""
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    adapters = {name.removeprefix(_PREFIX): tensor.double().requires_grad_() for name, tensor in tensors.items()}
    return adapters, config["lora_alpha"] / config["r"]


def adapted(params: Params, adapters: Params, scale: float) -> Params:
    """``W + scale B A`` in place of each adapted weight."""
    changed = dict(params)
    for name in adapters:
        path, found, _ = name.partition(".lora_A.weight")
        if found:
            product = adapters[f"{path}.lora_B.weight"] @ adapters[name]
            changed[f"{path}.weight"] = params[f"{path}.weight"] + scale * product
    return changed


def train_step(
    folder: str | Path,
    adapter_folder: str | Path,
    pairs: Sequence[Pair],
    lr: float,
    options: Options,
    running: Running | None = None,
) -> tuple[float, float, Params, Params]:
    """One optimizer step on a global batch; the reference is the model without adapters.

    Returns:
        Loss, gradient norm and gradients before the step, and the adapters after it.
    """
    params, config = load(folder)
    params = {name: tensor.detach() for name, tensor in params.items()}
    adapters, scale = load_adapters(adapter_folder)
    running = running or Running()
    total = {name: torch.zeros_like(tensor) for name, tensor in adapters.items()}
    losses = []
    for prompt, *responses in pairs:
        changed = adapted(params, adapters, scale)
        unevenness: list[Tensor] = []
        scored = [sequence_logprob(changed, config, prompt, each, unevenness) for each in responses]
        sums, counts = zip(*scored, strict=True)
        reference = None
        if STAGES[options.stage].needs_reference:
            reference = tuple(sequence_logprob(params, config, prompt, each)[0].item() for each in responses)
        loss, metrics = score(Scores(sums, counts, reference, running.value), options)
        if options.moe_aux_loss_coeff:  # of both sequences of the pair, half each
            loss = loss + options.moe_aux_loss_coeff / 2 * torch.stack(unevenness).sum()
        losses.append(metrics["loss"])
        # an expert that no token of the pair chooses has no gradient
        parts = torch.autograd.grad(loss / len(pairs), list(adapters.values()), materialize_grads=True)
        _accumulate(total, parts)
    norm = grad_norm(total)
    # the 1e-6 is megatron-core's and torch's guard against a zero norm
    clip = min(1.0, options.clip_grad / (norm + 1e-6)) if options.clip_grad else 1.0
    AdamW(adapters, options).step({name: grad * clip for name, grad in total.items()}, lr)
    after = {name: tensor.detach() for name, tensor in adapters.items()}
    return sum(losses) / len(losses), norm, total, after


def _accumulate(total: Mapping[str, Tensor], parts: Sequence[Tensor]) -> None:
    for accumulated, part in zip(total.values(), parts, strict=True):
        accumulated += part
