"""The declaration of an objective. No field has a default, so the type checker reports a field that is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from mindspeed_simpo.losses import LossInputs, ObjectiveTerms


class Keys(BaseModel):
    """Configuration keys of one objective; subclasses add fields with ranges, defaults and descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One objective."""

    stage: str
    """The value of ``stage``; the name of the declaring file."""
    title: str
    """The name in sentences, such as ``SimPO``."""
    keys: type[Keys]
    """The keys of the configuration file that this objective reads."""
    formula: Callable[[LossInputs, Any], ObjectiveTerms]
    """``formula(inputs, keys)``: a pure function from the log-probability sums of each pair to its loss and rewards.

    The loss reaches the model through the two sums of each pair and nothing else: ``pair_schedule: two_pass`` needs
    ``dL/dchosen_logprob`` and ``dL/drejected_logprob`` only. Filler pairs have sums of 0 and counts of 0; what the
    formula returns for them is discarded, gradients included."""
    needs_reference: bool
    """Whether ``inputs`` must have the log-probability sums under a reference model."""
    rewards: str
    """The definition of ``rewards/chosen``, in one phrase for the documentation."""
    metrics: Mapping[str, str]
    """Name -> meaning of the metrics that only this objective has. The formula returns a value of each pair."""
    warnings: Callable[[Any], Iterator[str]]
    """``warnings(keys)``: messages of ``mindspeed-simpo check`` about values outside of the published ranges."""
    learning_rates: tuple[float, float]
    """Lowest and highest peak learning rate of published runs without adapters; ``check`` warns about other values."""
    tracked: Callable[[LossInputs], Tensor] | None
    """``tracked(inputs)``: a value of each pair. ``inputs.running`` has its running mean and standard deviation over
    the previous global batches. None for an objective without such statistics."""
    flat_beyond: Callable[[Any], float | None]
    """``flat_beyond(keys)``: the value of ``rewards/margins`` beyond which the preference term of a pair has less than
    1 % of its largest gradient. None where the gradient does not vanish with the margin."""
    source: str
    """The publication of the formula."""
