"""SimPER: the difference of inverse perplexities, without a reference model and without keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mindspeed_simpo.objectives._declaration import Keys, Objective

if TYPE_CHECKING:
    from mindspeed_simpo.losses import LossInputs, ObjectiveTerms


class SimperKeys(Keys):
    """``stage: simper`` has no keys."""


def simper(inputs: LossInputs, keys: SimperKeys) -> ObjectiveTerms:  # noqa: ARG001 - SimPER has no keys
    """``-exp(m_w) + exp(m_l)`` and rewards ``exp(m)``: the inverse perplexity of a response, in (0, 1]."""
    chosen, rejected = (mean.exp() for mean in inputs.scores(mean=True))
    return inputs.terms(rejected - chosen, chosen, rejected)


def _warnings(keys: SimperKeys) -> Iterator[str]:  # noqa: ARG001 - SimPER has no keys
    yield from ()


OBJECTIVE = Objective(
    stage="simper",
    title="SimPER",
    keys=SimperKeys,
    formula=simper,
    needs_reference=False,
    rewards="exp of the mean log-probability per token (inverse perplexity)",
    metrics={},
    warnings=_warnings,
    learning_rates=(3e-7, 1e-6),
    tracked=None,
    flat_beyond=lambda keys: None,  # noqa: ARG005 - the loss is not flat at large margins
    source="Xiao et al. 2025, arXiv:2502.00883",
)
