"""What training must compute: a dense fp64 single-process implementation that shares no code with the package.

It runs one unpadded sequence at a time through :mod:`tests.oracle_model` and leaves every derivative to autograd.
``params`` is always ``{Hugging Face name: fp64 tensor}``, ``config`` the content of config.json, a pair
``(prompt_ids, chosen_ids, rejected_ids)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.oracle_model import Params, load, sequence_logprob

Pair = tuple[Sequence[int], Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Options:
    """The options that the numbers depend on, under the names and with the defaults of a configuration file."""

    stage: str = "simpo"
    simpo_beta: float = 2.5
    gamma_beta_ratio: float = 0.55
    simpo_loss_type: str = "sigmoid"
    simpo_label_smoothing: float = 0.0
    pref_ftx: float = 0.0
    dpo_beta: float = 0.1
    dpo_loss_type: str = "sigmoid"
    dpo_label_smoothing: float = 0.0
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8


def _preference_loss(margin: Tensor, beta: float, loss_type: str, smoothing: float) -> Tensor:
    # log sigmoid(x) = -log(1 + exp(-x))
    if loss_type == "sigmoid":
        zero = torch.zeros_like(margin)
        right, wrong = torch.logaddexp(zero, -beta * margin), torch.logaddexp(zero, beta * margin)
        return (1 - smoothing) * right + smoothing * wrong
    if loss_type == "hinge":
        return torch.clamp(1 - beta * margin, min=0)
    if loss_type == "ipo":
        return (margin - 0.5 / beta).square()
    raise ValueError(f"loss_type {loss_type!r}")


def simpo_loss(chosen_mean: Tensor, rejected_mean: Tensor, options: Options) -> Tensor:
    """SimPO's loss of one pair from mean token log-probabilities."""
    z = chosen_mean - rejected_mean - options.gamma_beta_ratio
    loss = _preference_loss(z, options.simpo_beta, options.simpo_loss_type, options.simpo_label_smoothing)
    return loss + options.pref_ftx * -chosen_mean


def dpo_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, chosen_mean: Tensor, options: Options) -> Tensor:
    """DPO's loss of one pair from log-ratios (sum minus reference sum) and the chosen mean log-probability."""
    h = chosen_ratio - rejected_ratio
    loss = _preference_loss(h, options.dpo_beta, options.dpo_loss_type, options.dpo_label_smoothing)
    return loss + options.pref_ftx * -chosen_mean


def _score(
    params: Params, reference: Params, config: Mapping[str, Any], pair: Pair, options: Options
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one pair, with its graph, and the pair's metrics."""
    prompt, *responses = pair
    (chosen, chosen_count), (rejected, rejected_count) = (
        sequence_logprob(params, config, prompt, response) for response in responses
    )
    means = chosen / chosen_count, rejected / rejected_count
    if options.stage == "simpo":
        loss = simpo_loss(*means, options)
        rewards = [options.simpo_beta * mean.item() for mean in means]
    else:
        with torch.no_grad():
            base = [sequence_logprob(reference, config, prompt, response)[0] for response in responses]
        ratios = chosen - base[0], rejected - base[1]
        loss = dpo_loss(*ratios, means[0], options)
        rewards = [options.dpo_beta * ratio.item() for ratio in ratios]
    return loss, {
        "loss": loss.item(),
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/accuracies": float(rewards[0] > rewards[1]),
        "rewards/margins": rewards[0] - rewards[1],
        "logps/chosen": means[0].item(),
        "logps/rejected": means[1].item(),
        "sft_loss": -means[0].item(),
        "response_tokens/chosen": float(chosen_count),
        "response_tokens/rejected": float(rejected_count),
    }


def _mean(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: math.fsum(pair[key] for pair in metrics) / len(metrics) for key in metrics[0]}


def evaluate(
    folder: str | Path, pairs: Sequence[Pair], options: Options, ref_folder: str | Path | None = None
) -> dict[str, float]:
    """Each metric's mean over the pairs; ``logps/*`` in nats per token. DPO's reference defaults to ``folder``."""
    params, config = load(folder)
    reference = load(ref_folder)[0] if ref_folder else params
    with torch.no_grad():
        return _mean([_score(params, reference, config, pair, options)[1] for pair in pairs])


def _backward(
    params: Params, reference: Params, config: Mapping[str, Any], pairs: Sequence[Pair], options: Options
) -> tuple[dict[str, float], Params]:
    """Metrics and gradient of the mean loss; pair by pair, so that only one graph lives at a time."""
    total = {name: torch.zeros_like(param) for name, param in params.items()}
    metrics = []
    for pair in pairs:
        loss, scores = _score(params, reference, config, pair, options)
        metrics.append(scores)
        parts = torch.autograd.grad(loss / len(pairs), list(params.values()))
        for accumulated, part in zip(total.values(), parts, strict=True):
            accumulated += part
    return _mean(metrics), total


def gradients(
    folder: str | Path, pairs: Sequence[Pair], options: Options, ref_folder: str | Path | None = None
) -> Params:
    """Gradient of the mean loss over ``pairs``, by Hugging Face name; tied weights have one, the embedding's."""
    params, config = load(folder)
    return _backward(params, load(ref_folder or folder)[0], config, pairs, options)[1]


def grad_norm(grads: Mapping[str, Tensor]) -> float:
    """L2 norm over all gradients together."""
    return math.sqrt(math.fsum(grad.square().sum().item() for grad in grads.values()))


class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101), bias-corrected; one-dimensional tensors do not decay."""

    def __init__(self, params: Params, options: Options) -> None:
        self._params, self._options, self._steps = params, options, 0
        self._first = {name: torch.zeros_like(param) for name, param in params.items()}
        self._second = {name: torch.zeros_like(param) for name, param in params.items()}

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], lr: float) -> None:
        """Move the parameters, in place, against ``grads`` (already clipped)."""
        options, self._steps = self._options, self._steps + 1
        beta1, beta2 = options.adam_beta1, options.adam_beta2
        for name, param in self._params.items():
            self._first[name].lerp_(grads[name], 1 - beta1)
            self._second[name].lerp_(grads[name].square(), 1 - beta2)
            first = self._first[name] / (1 - beta1**self._steps)
            second = self._second[name] / (1 - beta2**self._steps)
            decay = options.weight_decay if param.dim() > 1 else 0.0
            param -= lr * (first / (second.sqrt() + options.adam_eps) + decay * param)


def train(
    folder: str | Path,
    batches: Iterable[Sequence[Pair]],
    lrs: Sequence[float],
    options: Options,
    ref_folder: str | Path | None = None,
) -> tuple[list[tuple[float, float]], Params]:
    """One optimizer step for each global batch, with that step's learning rate.

    Returns:
        ``(loss, grad_norm)`` of each step, both before it, the norm before clipping; and the final parameters.
    """
    params, config = load(folder)
    reference = load(ref_folder or folder)[0]
    optimizer, history = AdamW(params, options), []
    for pairs, lr in zip(batches, lrs, strict=True):
        metrics, grads = _backward(params, reference, config, pairs, options)
        norm = grad_norm(grads)
        # the 1e-6 is megatron-core's and torch's guard against a zero norm
        scale = min(1.0, options.clip_grad / (norm + 1e-6)) if options.clip_grad else 1.0
        optimizer.step({name: grad * scale for name, grad in grads.items()}, lr)
        history.append((metrics["loss"], norm))
    return history, params
