"""ORPO: a supervised loss with a penalty on the odds of the rejected response, without a reference model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from mindspeed_simpo.objectives._declaration import Keys, Objective
from mindspeed_simpo.objectives._functions import log1m_exp, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor

    from mindspeed_simpo.losses import LossInputs, ObjectiveTerms


class OrpoKeys(Keys):
    """Keys of ``stage: orpo``."""

    orpo_lambda: float = Field(
        0.1, ge=0, description="Weight of ORPO's odds ratio term beside the supervised one, no unit."
    )


def orpo(inputs: LossInputs, keys: OrpoKeys) -> ObjectiveTerms:
    """``-m_w - lambda * log sigmoid(l_w - l_l)`` with log odds ``l = m - log(1 - exp(m))``; rewards ``lambda * m``.

    ``exp(m)`` is the geometric mean of the token probabilities.
    """
    chosen, rejected = inputs.scores(mean=True)
    ratio = _log_odds(chosen) - _log_odds(rejected)
    loss = -chosen - keys.orpo_lambda * log_sigmoid(ratio)
    return inputs.terms(
        loss, keys.orpo_lambda * chosen, keys.orpo_lambda * rejected, **{"log_odds/ratio": ratio.detach()}
    )


def _log_odds(mean: Tensor) -> Tensor:
    return mean - log1m_exp(mean)


def _warnings(keys: OrpoKeys) -> Iterator[str]:
    if not 0.01 <= keys.orpo_lambda <= 1:
        yield f"orpo_lambda {keys.orpo_lambda:g}: published runs use 0.05 to 0.5, most of them 0.1"


OBJECTIVE = Objective(
    stage="orpo",
    title="ORPO",
    keys=OrpoKeys,
    formula=orpo,
    needs_reference=False,
    rewards="`orpo_lambda` x mean log-probability per token",
    metrics={"log_odds/ratio": "log odds of the chosen response minus log odds of the rejected one, nats"},
    warnings=_warnings,
    learning_rates=(5e-6, 8e-6),
    tracked=None,
    flat_beyond=lambda keys: None,  # noqa: ARG005 - the supervised term keeps its gradient
    source="Hong et al. 2024, arXiv:2403.07691, equations 6 and 7",
)
