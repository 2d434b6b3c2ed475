"""RePO: a hinge loss on the difference of mean log-probabilities, without a reference model or a reward scale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from mindspeed_simpo.objectives._declaration import Keys, Objective

if TYPE_CHECKING:
    from mindspeed_simpo.losses import LossInputs, ObjectiveTerms


class RepoKeys(Keys):
    """Keys of ``stage: repo``."""

    repo_margin: float = Field(0.5, ge=0, description="Target margin of RePO, nats per token.")


def repo(inputs: LossInputs, keys: RepoKeys) -> ObjectiveTerms:
    """``max(0, margin - (m_w - m_l))`` and rewards ``m``."""
    chosen, rejected = inputs.scores(mean=True)
    return inputs.terms((keys.repo_margin - (chosen - rejected)).relu(), chosen, rejected)


def _warnings(keys: RepoKeys) -> Iterator[str]:
    if not 0.2 <= keys.repo_margin <= 1:
        yield f"repo_margin {keys.repo_margin:g}: its authors' runs use 0.4 to 0.6"


OBJECTIVE = Objective(
    stage="repo",
    title="RePO",
    keys=RepoKeys,
    formula=repo,
    needs_reference=False,
    rewards="mean log-probability per token",
    metrics={},
    warnings=_warnings,
    learning_rates=(3e-7, 1e-6),
    tracked=None,
    flat_beyond=lambda keys: keys.repo_margin,
    source="Wu et al. 2025, arXiv:2503.07426",
)
