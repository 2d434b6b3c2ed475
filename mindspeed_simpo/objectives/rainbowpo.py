"""RainbowPO: length-normalised rewards; the margin interpolates between a reference model's margin and a constant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from mindspeed_simpo.objectives._declaration import Keys, Objective
from mindspeed_simpo.objectives._functions import FLAT_LOGIT, log_sigmoid

if TYPE_CHECKING:
    from mindspeed_simpo.losses import LossInputs, ObjectiveTerms


class RainbowpoKeys(Keys):
    """Keys of ``stage: rainbowpo``."""

    rainbowpo_beta: float = Field(2.5, gt=0, description="Reward scale of RainbowPO, per nat per token.")
    rainbowpo_reference_mix: float = Field(
        0.25, ge=0, le=1, description="Share of the reference model in the margin: 0 is SimPO, 1 is LN-DPO."
    )
    rainbowpo_gamma_beta_ratio: float = Field(
        0.55, ge=0, description="Constant part of the margin divided by beta, nats per token; 1 - mix of it counts."
    )


def rainbowpo(inputs: LossInputs, keys: RainbowpoKeys) -> ObjectiveTerms:
    """``-log sigmoid(beta * z)`` with ``z = (m_w - m_l) - a * (ref_w - ref_l) - (1 - a) * ratio``.

    ``a`` is the mix; ``m`` and ``ref`` are means over the response's tokens. The rewards are ``beta * (m - a * ref)``.
    """
    mix = keys.rainbowpo_reference_mix
    chosen, rejected = (
        mean - mix * reference
        for mean, reference in zip(inputs.scores(mean=True), inputs.reference_scores(mean=True), strict=True)
    )
    z = chosen - rejected - (1 - mix) * keys.rainbowpo_gamma_beta_ratio
    return inputs.terms(
        -log_sigmoid(keys.rainbowpo_beta * z), keys.rainbowpo_beta * chosen, keys.rainbowpo_beta * rejected
    )


def _warnings(keys: RainbowpoKeys) -> Iterator[str]:
    if not 2 <= keys.rainbowpo_beta <= 10:
        yield f"rainbowpo_beta {keys.rainbowpo_beta:g}: usual values are SimPO's, 2 to 10"
    if keys.rainbowpo_reference_mix == 0:
        yield "rainbowpo_reference_mix 0 is SimPO, for which no reference is computed: set stage: simpo"
    if not 0 < keys.rainbowpo_gamma_beta_ratio <= 1:
        yield (
            f"rainbowpo_gamma_beta_ratio {keys.rainbowpo_gamma_beta_ratio:g}: usual values are SimPO's, 0.1 to 0.8; "
            "it is the margin divided by beta, not the margin itself"
        )


def _flat_beyond(keys: RainbowpoKeys) -> float:
    target = (1 - keys.rainbowpo_reference_mix) * keys.rainbowpo_gamma_beta_ratio
    return keys.rainbowpo_beta * target + FLAT_LOGIT


OBJECTIVE = Objective(
    stage="rainbowpo",
    title="RainbowPO",
    keys=RainbowpoKeys,
    formula=rainbowpo,
    needs_reference=True,
    rewards="`rainbowpo_beta` x (mean log-probability minus `rainbowpo_reference_mix` x reference mean)",
    metrics={},
    warnings=_warnings,
    learning_rates=(3e-7, 1e-6),
    tracked=None,
    flat_beyond=_flat_beyond,
    source="Zhao et al. 2024, arXiv:2410.04203",
)
