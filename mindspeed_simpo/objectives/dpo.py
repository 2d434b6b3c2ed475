"""DPO: log-probability sums relative to those of a reference model; with length normalisation, LN-DPO."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from mindspeed_simpo.objectives._declaration import Keys, Objective
from mindspeed_simpo.objectives._functions import LossType, flat_beyond, preference_loss

if TYPE_CHECKING:
    from mindspeed_simpo.losses import LossInputs, ObjectiveTerms


class DpoKeys(Keys):
    """Keys of ``stage: dpo``."""

    dpo_beta: float = Field(0.1, gt=0, description="Reward scale of DPO, per nat (per nat per token of LN-DPO).")
    dpo_loss_type: LossType = Field("sigmoid", description="Form of the DPO loss.")
    dpo_label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Probability that a preference label is wrong (sigmoid loss only)."
    )
    dpo_length_norm: bool = Field(
        False, description="Divide log-probability sums by the response's tokens, the reference's too (LN-DPO)."
    )

    @model_validator(mode="after")
    def _smoothing_needs_sigmoid(self) -> DpoKeys:
        if self.dpo_label_smoothing and self.dpo_loss_type != "sigmoid":
            raise ValueError("dpo_label_smoothing needs dpo_loss_type: sigmoid")
        return self


def dpo(inputs: LossInputs, keys: DpoKeys) -> ObjectiveTerms:
    """``-log sigmoid(beta * h)`` with ``h = (s_w - ref_w) - (s_l - ref_l)`` and rewards ``beta * (s - ref)``.

    The other forms of ``dpo_loss_type`` are those of :func:`~mindspeed_simpo.objectives._functions.preference_loss`,
    on sums, not divided by the lengths. With ``dpo_length_norm`` means replace all sums.
    """
    chosen, rejected = inputs.scores(mean=keys.dpo_length_norm)
    reference_chosen, reference_rejected = inputs.reference_scores(mean=keys.dpo_length_norm)
    chosen_ratio, rejected_ratio = chosen - reference_chosen, rejected - reference_rejected
    loss = preference_loss(chosen_ratio - rejected_ratio, keys.dpo_beta, keys.dpo_loss_type, keys.dpo_label_smoothing)
    return inputs.terms(loss, keys.dpo_beta * chosen_ratio, keys.dpo_beta * rejected_ratio)


def _warnings(keys: DpoKeys) -> Iterator[str]:
    if keys.dpo_length_norm:
        if not 1 <= keys.dpo_beta <= 10:
            yield f"dpo_beta {keys.dpo_beta:g}: published runs of LN-DPO (dpo_length_norm) use 5"
    elif not 0.01 <= keys.dpo_beta <= 0.5:
        yield f"dpo_beta {keys.dpo_beta:g}: usual values are 0.01 to 0.5"


OBJECTIVE = Objective(
    stage="dpo",
    title="DPO",
    keys=DpoKeys,
    formula=dpo,
    needs_reference=True,
    rewards="`dpo_beta` x (sum minus reference sum); means in place of sums with `dpo_length_norm`",
    metrics={},
    warnings=_warnings,
    learning_rates=(3e-7, 1e-6),
    tracked=None,
    flat_beyond=lambda keys: flat_beyond(keys.dpo_loss_type),
    source="Rafailov et al. 2023, arXiv:2305.18290, equation 7; hinge: arXiv:2305.10425; ipo: arXiv:2310.12036; "
    "smoothing: arXiv:2403.00409; length normalisation: arXiv:2407.15229",
)
