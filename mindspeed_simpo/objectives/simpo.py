"""SimPO: the length-normalised log-probability as reward, with a target margin and without a reference model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from mindspeed_simpo.objectives._declaration import Keys, Objective
from mindspeed_simpo.objectives._functions import LossType, flat_beyond, preference_loss

if TYPE_CHECKING:
    from mindspeed_simpo.losses import LossInputs, ObjectiveTerms


class SimpoKeys(Keys):
    """Keys of ``stage: simpo``."""

    simpo_beta: float = Field(2.5, gt=0, description="Reward scale of SimPO, per nat per token.")
    gamma_beta_ratio: float = Field(
        0.55,
        ge=0,
        description="Target reward margin divided by beta, nats per token (the paper's gamma is ratio x beta).",
    )
    simpo_loss_type: LossType = Field("sigmoid", description="Form of the SimPO loss.")
    simpo_label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Probability that a preference label is wrong (sigmoid loss only)."
    )
    simpo_length_norm: bool = Field(
        True, description="Divide log-probability sums by the response's tokens; false is the paper's ablation."
    )

    @model_validator(mode="after")
    def _smoothing_needs_sigmoid(self) -> SimpoKeys:
        if self.simpo_label_smoothing and self.simpo_loss_type != "sigmoid":
            raise ValueError("simpo_label_smoothing needs simpo_loss_type: sigmoid")
        return self


def simpo(inputs: LossInputs, keys: SimpoKeys) -> ObjectiveTerms:
    """``-log sigmoid(beta * z)`` with ``z = m_w - m_l - gamma_beta_ratio`` and rewards ``beta * m``.

    The other forms of ``simpo_loss_type`` are those of :func:`~mindspeed_simpo.objectives._functions.preference_loss`.
    Without ``simpo_length_norm`` the sums ``s`` replace the means ``m``.
    """
    chosen, rejected = inputs.scores(mean=keys.simpo_length_norm)
    z = chosen - rejected - keys.gamma_beta_ratio
    loss = preference_loss(z, keys.simpo_beta, keys.simpo_loss_type, keys.simpo_label_smoothing)
    return inputs.terms(loss, keys.simpo_beta * chosen, keys.simpo_beta * rejected)


def _warnings(keys: SimpoKeys) -> Iterator[str]:
    if not 2 <= keys.simpo_beta <= 10:
        yield f"simpo_beta {keys.simpo_beta:g}: the paper's runs use 2 to 10"
    if not 0 < keys.gamma_beta_ratio <= 1:
        yield (
            f"gamma_beta_ratio {keys.gamma_beta_ratio:g}: the paper's runs use 0.1 to 0.8; it is the margin "
            "gamma divided by beta, not gamma itself"
        )
    if not keys.simpo_length_norm:
        yield "simpo_length_norm: false is an ablation: the paper's runs show longer and worse answers with it"


def _flat_beyond(keys: SimpoKeys) -> float | None:
    flat = flat_beyond(keys.simpo_loss_type)
    return None if flat is None else keys.simpo_beta * keys.gamma_beta_ratio + flat


OBJECTIVE = Objective(
    stage="simpo",
    title="SimPO",
    keys=SimpoKeys,
    formula=simpo,
    needs_reference=False,
    rewards="`simpo_beta` x mean log-probability per token (x the sum without `simpo_length_norm`)",
    metrics={},
    warnings=_warnings,
    learning_rates=(3e-7, 1e-6),
    tracked=None,
    flat_beyond=_flat_beyond,
    source="Meng et al. 2024, arXiv:2405.14734, equation 6",
)
