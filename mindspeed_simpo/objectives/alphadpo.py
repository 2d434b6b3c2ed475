"""alpha-DPO: SimPO with a target margin for each pair, by how far the policy differs from a reference model on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from mindspeed_simpo.objectives._declaration import Keys, Objective
from mindspeed_simpo.objectives._functions import FLAT_LOGIT, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor

    from mindspeed_simpo.losses import LossInputs, ObjectiveTerms

_LEAST_DEVIATION = 0.01
"""Nats per token. In the first steps policy and reference are nearly equal: the gaps' deviation is rounding error."""


class AlphadpoKeys(Keys):
    """Keys of ``stage: alphadpo``."""

    alphadpo_beta: float = Field(2.5, gt=0, description="Reward scale of alpha-DPO, per nat per token.")
    alphadpo_alpha: float = Field(
        0.1, ge=0, description="Weight of a pair's normalised gap in its margin, nats per token for one deviation."
    )
    alphadpo_gamma_beta_ratio: float = Field(
        0.3, ge=0, description="Constant part of the margin divided by beta, nats per token."
    )


def gap(inputs: LossInputs) -> Tensor:
    """``(m_w - m_l) - (ref_w - ref_l)``, ``[pair]``, with means over each response's tokens, nats per token."""
    (chosen, rejected), (reference_chosen, reference_rejected) = (
        inputs.scores(mean=True),
        inputs.reference_scores(mean=True),
    )
    return chosen - rejected - (reference_chosen - reference_rejected)


def alphadpo(inputs: LossInputs, keys: AlphadpoKeys) -> ObjectiveTerms:
    """``-log sigmoid(beta * (m_w - m_l - sg[ratio + alpha * z]))``; rewards ``beta * (m - alpha * (m - ref))``.

    ``z = (gap - mean) / max(deviation, 0.01)`` with the running mean and standard deviation of :func:`gap` over the
    previous global batches; ``z = 0`` in the first global batch. ``sg`` is stop-gradient.
    """
    alpha, beta = keys.alphadpo_alpha, keys.alphadpo_beta
    (chosen, rejected), references = inputs.scores(mean=True), inputs.reference_scores(mean=True)
    distance = gap(inputs).detach()
    if inputs.running is None:
        z = distance.new_zeros(distance.shape)
    else:
        z = (distance - inputs.running.mean) / inputs.running.deviation.clamp(min=_LEAST_DEVIATION)
    margin = keys.alphadpo_gamma_beta_ratio + alpha * z
    loss = -log_sigmoid(beta * (chosen - rejected - margin))
    rewards = (
        beta * (mean - alpha * (mean - reference))
        for mean, reference in zip((chosen, rejected), references, strict=True)
    )
    return inputs.terms(loss, *rewards, target_margin=margin)


def _warnings(keys: AlphadpoKeys) -> Iterator[str]:
    if not 2 <= keys.alphadpo_beta <= 10:
        yield f"alphadpo_beta {keys.alphadpo_beta:g}: its authors' runs use 2.5 to 10"
    if not 0.01 <= keys.alphadpo_alpha <= 0.3:
        yield f"alphadpo_alpha {keys.alphadpo_alpha:g}: its authors' runs use 0.05 to 0.2"
    if not 0.1 <= keys.alphadpo_gamma_beta_ratio <= 0.8:
        yield (
            f"alphadpo_gamma_beta_ratio {keys.alphadpo_gamma_beta_ratio:g}: its authors' runs use 0.15 to 0.6; it is "
            "the margin divided by beta, not the margin itself"
        )


OBJECTIVE = Objective(
    stage="alphadpo",
    title="alpha-DPO",
    keys=AlphadpoKeys,
    formula=alphadpo,
    needs_reference=True,
    rewards="`alphadpo_beta` x (m - `alphadpo_alpha` x (m - reference mean)), m: mean log-probability per token",
    metrics={"target_margin": "`alphadpo_gamma_beta_ratio` plus `alphadpo_alpha` x normalised gap, nats per token"},
    warnings=_warnings,
    learning_rates=(3e-7, 1e-6),
    tracked=gap,
    flat_beyond=lambda keys: keys.alphadpo_beta * keys.alphadpo_gamma_beta_ratio + FLAT_LOGIT,
    source="Wu et al. 2024, arXiv:2410.10148",
)
