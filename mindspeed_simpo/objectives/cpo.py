"""CPO: the log-probability sums as rewards, with a supervised term and without a reference model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from mindspeed_simpo.objectives._declaration import Keys, Objective
from mindspeed_simpo.objectives._functions import FLAT_LOGIT, log_sigmoid

if TYPE_CHECKING:
    from mindspeed_simpo.losses import LossInputs, ObjectiveTerms


class CpoKeys(Keys):
    """Keys of ``stage: cpo``."""

    cpo_beta: float = Field(0.1, gt=0, description="Reward scale of CPO, per nat.")
    cpo_alpha: float = Field(
        1.0, ge=0, description="Weight of CPO's supervised term, minus the mean chosen log-probability, no unit."
    )


def cpo(inputs: LossInputs, keys: CpoKeys) -> ObjectiveTerms:
    """``-log sigmoid(beta * (s_w - s_l)) - alpha * m_w`` and rewards ``beta * s``.

    The preference term uses the sums ``s``, the supervised term the mean ``m``.
    """
    chosen, rejected = inputs.scores(mean=False)
    chosen_mean, _ = inputs.scores(mean=True)
    loss = -log_sigmoid(keys.cpo_beta * (chosen - rejected)) - keys.cpo_alpha * chosen_mean
    return inputs.terms(loss, keys.cpo_beta * chosen, keys.cpo_beta * rejected)


def _warnings(keys: CpoKeys) -> Iterator[str]:
    if not 0.01 <= keys.cpo_beta <= 0.5:
        yield f"cpo_beta {keys.cpo_beta:g}: its authors use 0.1; it scales sums, not means per token"
    if not 0 < keys.cpo_alpha <= 2:
        yield f"cpo_alpha {keys.cpo_alpha:g}: its authors use 1"


OBJECTIVE = Objective(
    stage="cpo",
    title="CPO",
    keys=CpoKeys,
    formula=cpo,
    needs_reference=False,
    rewards="`cpo_beta` x log-probability sum",
    metrics={},
    warnings=_warnings,
    learning_rates=(3e-7, 1e-6),
    tracked=None,
    flat_beyond=lambda keys: FLAT_LOGIT,  # noqa: ARG005 - the logit is the margin of the rewards
    source="Xu et al. 2024, arXiv:2401.08417",
)
