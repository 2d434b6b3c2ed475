"""What training must compute: a dense fp64 single-process implementation that shares no code with the package.

It reads Hugging Face folders of the Qwen2, Qwen3, Llama and Mistral families (safetensors and config.json), runs one
unpadded sequence at a time and leaves every derivative to autograd. ``params`` is always ``{Hugging Face name: fp64
tensor}``, ``config`` the content of config.json, a pair ``(prompt_ids, chosen_ids, rejected_ids)``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.oracle_objectives import STAGES, Options, Running, Scores, score

Params = dict[str, Tensor]
Pair = tuple[Sequence[int], Sequence[int], Sequence[int]]


def load(folder: str | Path) -> tuple[Params, dict[str, Any]]:
    """All tensors of a Hugging Face folder as fp64 leaves that require a gradient, and its config.json."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    params = {}
    for file in sorted(folder.glob("*.safetensors")):
        params.update({name: tensor.double().requires_grad_() for name, tensor in load_file(file).items()})
    if config.get("tie_word_embeddings"):
        params.pop("lm_head.weight", None)
    return params, config


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _inverse_frequencies(config: Mapping[str, Any]) -> Tensor:
    """Rotary angle per position of each pair of dimensions, [head_dim / 2]."""
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"], **(config.get("rope_scaling") or {})}
    dim = _head_dim(config)
    frequencies = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return frequencies
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r}")
    # Llama 3: wavelengths that the original context saw at least high_freq_factor times stay, those that it saw fewer
    # than low_freq_factor times are stretched by factor, and between them the frequency is interpolated
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / rope["factor"]


def _rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """Turn the dimensions (i, i + head_dim / 2) of each head by its position's angle; ``heads`` [seq, head, dim]."""
    first, second = heads.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    return values / (values.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _linear(params: Params, name: str, values: Tensor) -> Tensor:
    product = values @ params[f"{name}.weight"].T
    return product + params[f"{name}.bias"] if f"{name}.bias" in params else product


def _attention(params: Params, config: Mapping[str, Any], name: str, hidden: Tensor, angles: Tensor) -> Tensor:
    seq, dim, eps = hidden.shape[0], _head_dim(config), config["rms_norm_eps"]
    query, key, value = (_linear(params, f"{name}.{part}_proj", hidden).view(seq, -1, dim) for part in ("q", "k", "v"))
    if f"{name}.q_norm.weight" in params:
        query = _norm(query, params[f"{name}.q_norm.weight"], eps)
        key = _norm(key, params[f"{name}.k_norm.weight"], eps)
    query, key = _rotate(query, angles), _rotate(key, angles)
    shared_by = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(shared_by, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(dim)
    future = torch.ones(seq, seq, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    return _linear(params, f"{name}.o_proj", torch.einsum("hqk,khd->qhd", weights, value).reshape(seq, -1))


def logits(params: Params, config: Mapping[str, Any], tokens: Sequence[int]) -> Tensor:
    """Next-token logits of one sequence, [seq, vocabulary], fp64."""
    ids = torch.as_tensor(tokens)
    eps = config["rms_norm_eps"]
    angles = torch.arange(len(ids), dtype=torch.float64)[:, None] * _inverse_frequencies(config)
    hidden = params["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        normed = _norm(hidden, params[f"{name}.input_layernorm.weight"], eps)
        hidden = hidden + _attention(params, config, f"{name}.self_attn", normed, angles)
        normed = _norm(hidden, params[f"{name}.post_attention_layernorm.weight"], eps)
        gate, up = (_linear(params, f"{name}.mlp.{part}_proj", normed) for part in ("gate", "up"))
        hidden = hidden + _linear(params, f"{name}.mlp.down_proj", gate * torch.sigmoid(gate) * up)
    hidden = _norm(hidden, params["model.norm.weight"], eps)
    return hidden @ params.get("lm_head.weight", params["model.embed_tokens.weight"]).T


def sequence_logprob(
    params: Params, config: Mapping[str, Any], prompt_ids: Sequence[int], response_ids: Sequence[int]
) -> tuple[Tensor, int]:
    """Sum of the response tokens' log-probabilities given all tokens before each (nats), and their number.

    A token with nothing before it has no probability: the first one of a response without a prompt is not scored.
    """
    tokens = [*prompt_ids, *response_ids]
    scored = tokens[max(1, len(prompt_ids)) :]
    logprobs = logits(params, config, tokens[:-1]).log_softmax(-1)[-len(scored) :]
    return logprobs.gather(1, torch.as_tensor(scored)[:, None]).sum(), len(scored)


def _scores(
    params: Params,
    reference: Params,
    config: Mapping[str, Any],
    pair: Pair,
    options: Options,
    running: Running,
) -> Scores:
    prompt, *responses = pair
    sums, counts = zip(*(sequence_logprob(params, config, prompt, response) for response in responses), strict=True)
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
    total = {name: torch.zeros_like(param) for name, param in params.items()}
    metrics, gaps = [], []
    for pair in pairs:
        scores = _scores(params, reference, config, pair, options, running)
        loss, named = score(scores, options)
        metrics.append(named)
        if STAGES[options.stage].tracks_gap:
            gaps.append(scores.gap)
        parts = torch.autograd.grad(loss / len(pairs), list(params.values()))
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
        # the 1e-6 is megatron-core's and torch's guard against a zero norm
        scale = min(1.0, options.clip_grad / (norm + 1e-6)) if options.clip_grad else 1.0
        optimizer.step({name: grad * scale for name, grad in grads.items()}, lr)
        history.append((metrics["loss"], norm))
    return history, params
