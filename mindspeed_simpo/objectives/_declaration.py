"""What an objective declares. No part has a default, so that the type checker names one that is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from mindspeed_simpo.batch import LossInputs, ObjectiveTerms


class Keys(BaseModel):
    """Configuration keys of one objective; subclasses add fields with ranges, defaults and descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One value of ``stage``."""

    stage: str
    title: str
    """The name in sentences, such as ``SimPO``."""
    keys: type[Keys]
    """The keys of the configuration file that this objective reads; their names begin with the stage's name."""
    formula: Callable[[LossInputs, Any], ObjectiveTerms]
    """``formula(inputs, keys)``: a pure function from the log-probability sums of each pair to its loss and rewards.

    The loss reaches the model through the two sums of each pair and nothing else: ``pair_schedule: two_pass`` needs
    ``dL/dchosen_logprob`` and ``dL/drejected_logprob`` only. Filler pairs have sums of 0 and counts of 0; what the
    formula returns for them is discarded, gradients included."""
    needs_reference: bool
    """Whether ``inputs`` must hold the sums under a reference model."""
    rewards: str
    """What ``rewards/chosen`` is, in one phrase for the documentation."""
    metrics: Mapping[str, str]
    """Metrics of its own: name -> meaning. The formula returns each of them by pair."""
    warnings: Callable[[Any], Iterator[str]]
    """``warnings(keys)``: what ``mindspeed-simpo check`` says of values outside of the published ranges."""
    learning_rates: tuple[float, float]
    """The lowest and the highest peak learning rate of published runs of whole models; ``check`` warns of others."""
    tracked: Callable[[LossInputs], Tensor] | None
    """A value of each pair whose running mean and deviation over the global batches so far ``inputs.running`` holds."""
    source: str
    """Where the formula is published."""
