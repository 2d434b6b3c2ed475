"""What training must compute: a dense fp64 single-process implementation that shares no code with the package.

It runs one unpadded sequence at a time through :mod:`tests.oracle_model` and leaves every derivative to autograd.
``params`` is always ``{Hugging Face name: fp64 tensor}``, ``config`` the content of config.json, a pair
``(prompt_ids, chosen_ids, rejected_ids)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.oracle_model import Params, load, sequence_logprob
from tests.oracle_objectives import STAGES, Options, Running, Scores, score

Pair = tuple[Sequence[int], Sequence[int], Sequence[int]]


def _scores(
    params: Params,
    reference: Params,
    config: Mapping[str, Any],
    pair: Pair,
    options: Options,
    running: Running,
    unevenness: list[Tensor] | None = None,
) -> Scores:
    prompt, *responses = pair
    scored = [sequence_logprob(params, config, prompt, response, unevenness) for response in responses]
    sums, counts = zip(*scored, strict=True)
    base = None
    if STAGES[options.stage].needs_reference:
        with torch.no_grad():
            base = tuple(sequence_logprob(reference, config, prompt, response)[0].item() for response in responses)
    return Scores(sums, counts, base, running.value)


def _mean(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: math.fsum(pair[key] for pair in metrics) / len(metrics) for key in metrics[0]}


def evaluate(
    folder: str | Path,
    pairs: Sequence[Pair],
    options: Options,
    ref_folder: str | Path | None = None,
    running: Running | None = None,
) -> dict[str, float]:
    """Each metric's mean over the pairs; ``logps/*`` in nats per token. The reference defaults to ``folder``."""
    params, config = load(folder)
    reference = load(ref_folder)[0] if ref_folder else params
    running = running or Running()
    with torch.no_grad():
        scores = [_scores(params, reference, config, pair, options, running) for pair in pairs]
        return _mean([score(pair, options)[1] for pair in scores])


def _backward(
    params: Params,
    reference: Params,
    config: Mapping[str, Any],
    pairs: Sequence[Pair],
    options: Options,
    running: Running,
) -> tuple[dict[str, float], Params, list[float]]:
    """Metrics, gradient of the mean loss, gaps of the pairs; pair by pair, so that only one graph lives at a time."""
    trained = {name: param for name, param in params.items() if param.requires_grad}
    total = {name: torch.zeros_like(param) for name, param in trained.items()}
    metrics, gaps = [], []
    for pair in pairs:
        unevenness: list[Tensor] = []
        scores = _scores(params, reference, config, pair, options, running, unevenness)
        loss, named = score(scores, options)
        if options.moe_aux_loss_coeff:  # of both sequences of the pair, half each
            loss = loss + options.moe_aux_loss_coeff / 2 * torch.stack(unevenness).sum()
        metrics.append(named)
        if STAGES[options.stage].tracks_gap:
            gaps.append(scores.gap)
        # an expert that no token of the pair chooses has no gradient
        parts = torch.autograd.grad(loss / len(pairs), list(trained.values()), materialize_grads=True)
        for accumulated, part in zip(total.values(), parts, strict=True):
            accumulated += part
    return _mean(metrics), total, gaps


def gradients(
    folder: str | Path,
    pairs: Sequence[Pair],
    options: Options,
    ref_folder: str | Path | None = None,
    running: Running | None = None,
) -> Params:
    """Gradient of the mean loss over ``pairs``, by Hugging Face name; tied weights have one, the embedding's."""
    params, config = load(folder)
    return _backward(params, load(ref_folder or folder)[0], config, pairs, options, running or Running())[1]


def train_step(
    folder: str | Path,
    pairs: Sequence[Pair],
    lr: float,
    options: Options,
    ref_folder: str | Path | None = None,
    running: Running | None = None,
) -> tuple[float, float, Params, Params]:
    """The first optimizer step: loss, gradient norm and gradients before it, and the parameters after it."""
    params, config = load(folder)
    reference = load(ref_folder or folder)[0]
    metrics, grads, _ = _backward(params, reference, config, pairs, options, running or Running())
    norm = grad_norm(grads)
    AdamW(params, options).step(_clipped(grads, norm, options), lr)
    return metrics["loss"], norm, grads, params


def _clipped(grads: Params, norm: float, options: Options) -> Params:
    # the 1e-6 is megatron-core's and torch's guard against a zero norm
    scale = min(1.0, options.clip_grad / (norm + 1e-6)) if options.clip_grad else 1.0
    return {name: grad * scale for name, grad in grads.items()}


def grad_norm(grads: Mapping[str, Tensor]) -> float:
    """L2 norm over all gradients together."""
    return math.sqrt(math.fsum(grad.square().sum().item() for grad in grads.values()))


class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101), bias-corrected; biases and norms do not decay."""

    def __init__(self, params: Params, options: Options) -> None:
        self._params, self._options, self._steps = params, options, 0
        self._first = {name: torch.zeros_like(param) for name, param in params.items()}
        self._second = {name: torch.zeros_like(param) for name, param in params.items()}

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], lr: float) -> None:
        """Move the parameters, in place, against ``grads`` (already clipped)."""
        options, self._steps = self._options, self._steps + 1
        beta1, beta2 = options.adam_beta1, options.adam_beta2
        for name in grads:
            param = self._params[name]
            self._first[name].lerp_(grads[name], 1 - beta1)
            self._second[name].lerp_(grads[name].square(), 1 - beta2)
            first = self._first[name] / (1 - beta1**self._steps)
            second = self._second[name] / (1 - beta2**self._steps)
            # the biases of all experts of a layer may be one tensor
            decay = 0.0 if param.dim() == 1 or name.endswith("bias") else options.weight_decay
            param -= lr * (first / (second.sqrt() + options.adam_eps) + decay * param)


def train(
    folder: str | Path,
    batches: Iterable[Sequence[Pair]],
    lrs: Sequence[float],
    options: Options,
    ref_folder: str | Path | None = None,
    running: Running | None = None,
) -> tuple[list[tuple[float, float]], Params]:
    """One optimizer step for each global batch, with that step's learning rate.

    ``running`` holds the statistics of the batches before; those of ``batches`` join it where the objective needs them.

    Returns:
        ``(loss, grad_norm)`` of each step, both before it, the norm before clipping; and the final parameters.
    """
    params, config = load(folder)
    reference = load(ref_folder or folder)[0]
    optimizer, history = AdamW(params, options), []
    running = running or Running()
    for pairs, lr in zip(batches, lrs, strict=True):
        metrics, grads, gaps = _backward(params, reference, config, pairs, options, running)
        if gaps:
            running.join(gaps)
        norm = grad_norm(grads)
        optimizer.step(_clipped(grads, norm, options), lr)
        history.append((metrics["loss"], norm))
    return history, params
