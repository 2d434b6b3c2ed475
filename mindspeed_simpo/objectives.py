"""Preference objectives: pure functions from per-pair log-probability sums to per-pair losses.

Notation: for a pair, ``s_w, s_l`` are the sums of response-token log-probabilities of chosen and rejected (nats) and
``n_w, n_l`` the numbers of those tokens; ``m = s / n``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from mindspeed_simpo.batch import LossInputs, LossOutput
from mindspeed_simpo.config.options import TaskOptions

LossType = Literal["sigmoid", "hinge", "ipo"]
Objective = Callable[[LossInputs], LossOutput]
"""Losses that reach the model through the two sums of each pair and nothing else: ``pair_schedule: two_pass`` needs
``dL/dchosen_logprob`` and ``dL/drejected_logprob`` only, and refuses a loss with other inputs that have a gradient."""


def simpo(
    inputs: LossInputs,
    *,
    beta: float = 2.5,
    gamma_beta_ratio: float = 0.55,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    pref_ftx: float = 0.0,
) -> LossOutput:
    """SimPO: ``-log sigmoid(beta * z) - pref_ftx * m_w`` with ``z = m_w - m_l - gamma_beta_ratio``.

    The first term for each ``loss_type``, with ``e = label_smoothing``:

    - ``sigmoid``: ``-(1 - e) * log sigmoid(beta * z) - e * log sigmoid(-beta * z)``
    - ``hinge``: ``max(0, 1 - beta * z)``
    - ``ipo``: ``(z - 1 / (2 * beta))**2``

    Args:
        inputs: Sums and counts of each pair, already reduced over TP and CP; the reference sums are not used.
        beta: Reward scale, per nat per token, > 0.
        gamma_beta_ratio: Target reward margin divided by ``beta``, nats per token, >= 0.
        loss_type: Form of the first term.
        label_smoothing: Probability that a preference label is wrong, in [0, 0.5); ``sigmoid`` only.
        pref_ftx: Weight of the supervised term; the division by the length is in ``m_w`` and happens once.

    Returns:
        Per pair, not reduced. Rewards are ``beta * m``, without the margin. All zero for a filler pair.

    Source:
        Meng et al. 2024, arXiv:2405.14734, equation 6.
    """
    chosen_mean, rejected_mean = _mean_logprobs(inputs)
    z = chosen_mean - rejected_mean - gamma_beta_ratio
    loss = _preference_loss(z, beta, loss_type, label_smoothing)
    return _output(inputs, loss, pref_ftx, chosen_mean, beta * chosen_mean, beta * rejected_mean)


def dpo(
    inputs: LossInputs,
    *,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    pref_ftx: float = 0.0,
) -> LossOutput:
    """DPO: ``-log sigmoid(beta * h) - pref_ftx * m_w`` with ``h = (s_w - ref_w) - (s_l - ref_l)``.

    The first term for each ``loss_type``, with ``e = label_smoothing``:

    - ``sigmoid``: ``-(1 - e) * log sigmoid(beta * h) - e * log sigmoid(-beta * h)``
    - ``hinge``: ``max(0, 1 - beta * h)``
    - ``ipo``: ``(h - 1 / (2 * beta))**2``, on sums, without a division by the lengths

    Args:
        inputs: Sums and counts of each pair, already reduced over TP and CP, with the reference sums.
        beta: Reward scale, per nat, > 0.
        loss_type: Form of the first term.
        label_smoothing: Probability that a preference label is wrong, in [0, 0.5); ``sigmoid`` only.
        pref_ftx: Weight of the supervised term, minus the chosen mean log-probability per token.

    Returns:
        Per pair, not reduced. Rewards are ``beta * (s - ref)``. All zero for a filler pair.

    Raises:
        ValueError: if ``inputs`` has no reference log-probabilities.

    Source:
        Rafailov et al. 2023, arXiv:2305.18290, equation 7; hinge: Zhao et al. 2023, arXiv:2305.10425; ipo: Azar et
        al. 2023, arXiv:2310.12036; smoothing: Chowdhury et al. 2024, arXiv:2403.00409.
    """
    if inputs.reference_chosen_logprob is None or inputs.reference_rejected_logprob is None:
        raise ValueError("dpo needs the reference log-probabilities of both responses")
    chosen_mean, _ = _mean_logprobs(inputs)
    chosen_ratio = _of_valid(inputs, inputs.chosen_logprob - inputs.reference_chosen_logprob)
    rejected_ratio = _of_valid(inputs, inputs.rejected_logprob - inputs.reference_rejected_logprob)
    loss = _preference_loss(chosen_ratio - rejected_ratio, beta, loss_type, label_smoothing)
    return _output(inputs, loss, pref_ftx, chosen_mean, beta * chosen_ratio, beta * rejected_ratio)


def make_objective(options: TaskOptions) -> Objective:
    """The objective that ``options.stage`` names, with its options bound."""
    if options.stage == "dpo":
        return functools.partial(
            dpo,
            beta=options.dpo_beta,
            loss_type=options.dpo_loss_type,
            label_smoothing=options.dpo_label_smoothing,
            pref_ftx=options.pref_ftx,
        )
    return functools.partial(
        simpo,
        beta=options.simpo_beta,
        gamma_beta_ratio=options.gamma_beta_ratio,
        loss_type=options.simpo_loss_type,
        label_smoothing=options.simpo_label_smoothing,
        pref_ftx=options.pref_ftx,
    )


def _of_valid(inputs: LossInputs, values: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    # before any arithmetic, so that a filler pair's gradient is exactly zero, whatever its sums hold
    return torch.where(inputs.valid, values, 0.0)


def _mean_logprobs(inputs: LossInputs) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    chosen = _of_valid(inputs, inputs.chosen_logprob) / inputs.chosen_tokens.clamp(min=1)
    rejected = _of_valid(inputs, inputs.rejected_logprob) / inputs.rejected_tokens.clamp(min=1)
    return chosen, rejected


def _preference_loss(
    margin: Float[Tensor, " pair"], beta: float, loss_type: LossType, label_smoothing: float
) -> Float[Tensor, " pair"]:
    if loss_type == "sigmoid":
        loss = -(1 - label_smoothing) * logsigmoid(beta * margin)
        return loss - label_smoothing * logsigmoid(-beta * margin) if label_smoothing else loss
    if loss_type == "hinge":
        return torch.relu(1 - beta * margin)
    if loss_type == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    raise ValueError(f"loss_type: expected sigmoid, hinge or ipo, found {loss_type!r}")


def _output(
    inputs: LossInputs,
    loss: Float[Tensor, " pair"],
    pref_ftx: float,
    chosen_mean: Float[Tensor, " pair"],
    chosen_reward: Float[Tensor, " pair"],
    rejected_reward: Float[Tensor, " pair"],
) -> LossOutput:
    return LossOutput(
        loss=_of_valid(inputs, loss - pref_ftx * chosen_mean),
        sft_loss=-chosen_mean.detach(),
        chosen_reward=chosen_reward.detach(),
        rejected_reward=rejected_reward.detach(),
    )
