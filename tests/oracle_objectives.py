"""The oracle's objectives: loss and rewards of one pair in fp64, each written down from its paper."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """The options that the numbers depend on, under the names and with the defaults of a configuration file."""

    stage: str = "simpo"
    pref_ftx: float = 0.0
    simpo_beta: float = 2.5
    gamma_beta_ratio: float = 0.55
    simpo_loss_type: str = "sigmoid"
    simpo_label_smoothing: float = 0.0
    simpo_length_norm: bool = True
    dpo_beta: float = 0.1
    dpo_loss_type: str = "sigmoid"
    dpo_label_smoothing: float = 0.0
    dpo_length_norm: bool = False
    orpo_lambda: float = 0.1
    cpo_beta: float = 0.1
    cpo_alpha: float = 1.0
    alphapo_alpha: float = 0.25
    alphapo_beta: float = 2.5
    alphapo_gamma_beta_ratio: float = 0.1
    rainbowpo_beta: float = 2.5
    rainbowpo_reference_mix: float = 0.25
    rainbowpo_gamma_beta_ratio: float = 0.55
    repo_margin: float = 0.5
    alphadpo_beta: float = 2.5
    alphadpo_alpha: float = 0.1
    alphadpo_gamma_beta_ratio: float = 0.3
    moe_aux_loss_coeff: float = 0.0
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8


@dataclass
class Running:
    """Mean and deviation of a value of the pairs, over the global batches that have joined; None before the first."""

    value: tuple[float, float] | None = None

    def join(self, values: Sequence[float]) -> None:
        """Let the pairs of a global batch join, with a tenth of the weight of all before."""
        new = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        old = new if self.value is None else self.value
        self.value = 0.9 * old[0] + 0.1 * new[0], 0.9 * old[1] + 0.1 * new[1]


@dataclass(frozen=True)
class Scores:
    """What the model and its reference say of one pair: chosen, rejected."""

    sums: tuple[Tensor, Tensor]
    """Log-probabilities of the responses, nats."""
    counts: tuple[int, int]
    reference_sums: tuple[float, float] | None = None
    running: tuple[float, float] | None = None

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Nats per token."""
        return self.sums[0] / self.counts[0], self.sums[1] / self.counts[1]

    @property
    def reference_means(self) -> tuple[float, float]:
        """Of the reference model, nats per token."""
        return self.reference_sums[0] / self.counts[0], self.reference_sums[1] / self.counts[1]

    @property
    def gap(self) -> float:
        """How much further the policy's means are apart than the reference's, nats per token."""
        (chosen, rejected), (ref_chosen, ref_rejected) = self.means, self.reference_means
        return (chosen - ref_chosen).item() - (rejected - ref_rejected).item()


@dataclass(frozen=True)
class Terms:
    """What an objective says of one pair, without ``pref_ftx``."""

    loss: Tensor
    rewards: Sequence[Tensor]
    metrics: dict[str, float] = field(default_factory=dict)


def _minus_log_sigmoid(values: Tensor) -> Tensor:
    return torch.logaddexp(torch.zeros_like(values), -values)


def _preference_loss(margin: Tensor, beta: float, loss_type: str, smoothing: float) -> Tensor:
    if loss_type == "sigmoid":
        right, wrong = _minus_log_sigmoid(beta * margin), _minus_log_sigmoid(-beta * margin)
        return (1 - smoothing) * right + smoothing * wrong
    if loss_type == "hinge":
        return torch.clamp(1 - beta * margin, min=0)
    if loss_type == "ipo":
        return (margin - 0.5 / beta).square()
    raise ValueError(f"loss_type {loss_type!r}")


def _simpo(pair: Scores, options: Options) -> Terms:
    chosen, rejected = pair.means if options.simpo_length_norm else pair.sums
    z = chosen - rejected - options.gamma_beta_ratio
    loss = _preference_loss(z, options.simpo_beta, options.simpo_loss_type, options.simpo_label_smoothing)
    return Terms(loss, [options.simpo_beta * value for value in (chosen, rejected)])


def _dpo(pair: Scores, options: Options) -> Terms:
    scores, references = pair.sums, pair.reference_sums
    if options.dpo_length_norm:
        scores, references = pair.means, pair.reference_means
    ratios = [score - reference for score, reference in zip(scores, references, strict=True)]
    h = ratios[0] - ratios[1]
    loss = _preference_loss(h, options.dpo_beta, options.dpo_loss_type, options.dpo_label_smoothing)
    return Terms(loss, [options.dpo_beta * ratio for ratio in ratios])


def _orpo(pair: Scores, options: Options) -> Terms:
    chosen, rejected = (mean.exp() / (1 - mean.exp()) for mean in pair.means)
    penalty = -torch.log(chosen / (chosen + rejected))
    return Terms(
        -pair.means[0] + options.orpo_lambda * penalty,
        [options.orpo_lambda * mean for mean in pair.means],
        {"log_odds/ratio": torch.log(chosen / rejected).item()},
    )


def _cpo(pair: Scores, options: Options) -> Terms:
    rewards = [options.cpo_beta * value for value in pair.sums]
    return Terms(_minus_log_sigmoid(rewards[0] - rewards[1]) - options.cpo_alpha * pair.means[0], rewards)


def _simper(pair: Scores, options: Options) -> Terms:  # noqa: ARG001 - it has no keys
    chosen, rejected = (mean.exp() for mean in pair.means)
    return Terms(rejected - chosen, [chosen, rejected])


def _alphapo(pair: Scores, options: Options) -> Terms:
    alpha, beta = options.alphapo_alpha, options.alphapo_beta
    # a power of the geometric mean of the token probabilities
    shaped = [(1 - mean.exp().pow(-alpha)) / alpha if alpha else mean for mean in pair.means]
    z = shaped[0] - shaped[1] - options.alphapo_gamma_beta_ratio
    return Terms(_minus_log_sigmoid(beta * z), [beta * value for value in shaped])


def _rainbowpo(pair: Scores, options: Options) -> Terms:
    mix, beta = options.rainbowpo_reference_mix, options.rainbowpo_beta
    (chosen, rejected), (ref_chosen, ref_rejected) = pair.means, pair.reference_means
    margin = mix * (ref_chosen - ref_rejected) + (1 - mix) * options.rainbowpo_gamma_beta_ratio
    rewards = [beta * (chosen - mix * ref_chosen), beta * (rejected - mix * ref_rejected)]
    return Terms(_minus_log_sigmoid(beta * (chosen - rejected - margin)), rewards)


def _repo(pair: Scores, options: Options) -> Terms:
    chosen, rejected = pair.means
    return Terms(torch.clamp(options.repo_margin + rejected - chosen, min=0), [chosen, rejected])


def _alphadpo(pair: Scores, options: Options) -> Terms:
    alpha, beta = options.alphadpo_alpha, options.alphadpo_beta
    margin = options.alphadpo_gamma_beta_ratio
    if pair.running is not None:
        mean, deviation = pair.running
        margin += alpha * (pair.gap - mean) / max(deviation, 0.01)
    rewards = [
        beta * ((1 - alpha) * mean + alpha * reference)
        for mean, reference in zip(pair.means, pair.reference_means, strict=True)
    ]
    loss = _minus_log_sigmoid(beta * (pair.means[0] - pair.means[1] - margin))
    return Terms(loss, rewards, {"target_margin": margin})


@dataclass(frozen=True)
class Stage:
    """One objective of the oracle."""

    formula: Callable[[Scores, Options], Terms]
    needs_reference: bool = False
    tracks_gap: bool = False
    """Whether its loss depends on the running statistics of the pairs' gaps."""


STAGES = {
    "simpo": Stage(_simpo),
    "dpo": Stage(_dpo, needs_reference=True),
    "orpo": Stage(_orpo),
    "cpo": Stage(_cpo),
    "simper": Stage(_simper),
    "alphapo": Stage(_alphapo),
    "rainbowpo": Stage(_rainbowpo, needs_reference=True),
    "repo": Stage(_repo),
    "alphadpo": Stage(_alphadpo, needs_reference=True, tracks_gap=True),
}
"""Every objective by the value of ``stage``; there is none for an unknown one."""


def score(pair: Scores, options: Options) -> tuple[Tensor, dict[str, float]]:
    """Loss of one pair, ``pref_ftx`` included and with its graph, and the pair's metrics."""
    terms = STAGES[options.stage].formula(pair, options)
    loss = terms.loss - options.pref_ftx * pair.means[0]
    rewards = [reward.item() for reward in terms.rewards]
    return loss, {
        "loss": loss.item(),
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/accuracies": float(rewards[0] > rewards[1]),
        "rewards/margins": rewards[0] - rewards[1],
        "logps/chosen": pair.means[0].item(),
        "logps/rejected": pair.means[1].item(),
        "sft_loss": -pair.means[0].item(),
        "response_tokens/chosen": float(pair.counts[0]),
        "response_tokens/rejected": float(pair.counts[1]),
        **terms.metrics,
    }
