"""AlphaPO: SimPO with a reward transformed by a shape parameter, without a reference model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from mindspeed_simpo.objectives._declaration import Keys, Objective
from mindspeed_simpo.objectives._functions import FLAT_LOGIT, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor

    from mindspeed_simpo.losses import LossInputs, ObjectiveTerms


class AlphapoKeys(Keys):
    """Keys of ``stage: alphapo``."""

    alphapo_alpha: float = Field(
        0.25, ge=-10, le=10, description="Shape of AlphaPO's reward, per nat per token; 0 is SimPO's reward."
    )
    alphapo_beta: float = Field(2.5, gt=0, description="Reward scale of AlphaPO, per unit of the shaped mean.")
    alphapo_gamma_beta_ratio: float = Field(
        0.1, ge=0, description="Target margin of the shaped rewards divided by beta, in the unit of the shaped mean."
    )


def alphapo(inputs: LossInputs, keys: AlphapoKeys) -> ObjectiveTerms:
    """``-log sigmoid(beta * (rho_w - rho_l - ratio))`` with ``rho = (1 - exp(-alpha * m)) / alpha``.

    The rewards are ``beta * rho``. ``alpha = 0`` is the limit ``rho = m``, which is SimPO.
    """
    chosen, rejected = (_shaped(mean, keys.alphapo_alpha) for mean in inputs.scores(mean=True))
    loss = -log_sigmoid(keys.alphapo_beta * (chosen - rejected - keys.alphapo_gamma_beta_ratio))
    return inputs.terms(loss, keys.alphapo_beta * chosen, keys.alphapo_beta * rejected)


def _shaped(mean: Tensor, alpha: float) -> Tensor:
    # expm1: for a small argument, 1 - exp would lose all digits to cancellation
    return -(-alpha * mean).expm1() / alpha if alpha else mean


def _warnings(keys: AlphapoKeys) -> Iterator[str]:
    if not 0 < keys.alphapo_alpha <= 0.5:
        yield f"alphapo_alpha {keys.alphapo_alpha:g}: its authors' best runs use 0.25"
    if not 2 <= keys.alphapo_beta <= 10:
        yield f"alphapo_beta {keys.alphapo_beta:g}: its authors' runs use 2.5"
    if not 0 < keys.alphapo_gamma_beta_ratio <= 1:
        yield (
            f"alphapo_gamma_beta_ratio {keys.alphapo_gamma_beta_ratio:g}: its authors' runs use 0.1; it is "
            "the margin divided by beta, not the margin itself"
        )


OBJECTIVE = Objective(
    stage="alphapo",
    title="AlphaPO",
    keys=AlphapoKeys,
    formula=alphapo,
    needs_reference=False,
    rewards="`alphapo_beta` x (1 - exp(-`alphapo_alpha` x mean log-probability)) / `alphapo_alpha`",
    metrics={},
    warnings=_warnings,
    learning_rates=(3e-7, 1e-6),
    tracked=None,
    flat_beyond=lambda keys: keys.alphapo_beta * keys.alphapo_gamma_beta_ratio + FLAT_LOGIT,
    source="Gupta et al. 2025, arXiv:2501.03884",
)
