"""The options of the objective, made from the registry of objectives."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError, create_model, model_validator

from mindspeed_simpo.config.options.base import Options, option
from mindspeed_simpo.objectives import DEFAULT_STAGE, OBJECTIVES, Keys, Objective


class _TaskOptions(Options):
    """Checks of the objectives' keys; :func:`_task_fields` adds the keys from the registry of objectives."""

    if TYPE_CHECKING:
        stage: str
        pref_ftx: float
        ref_model: str | None

    @model_validator(mode="after")
    def _objective_agrees(self) -> _TaskOptions:
        for objective in OBJECTIVES.values():
            self.keys_of(objective)
        if self.ref_model is not None and not self.objective.needs_reference:
            others = ", ".join(name for name, objective in OBJECTIVES.items() if objective.needs_reference)
            raise ValueError(
                f"ref_model: {self.objective.title} has no reference model: remove ref_model, or set stage to one of "
                f"{others}"
            )
        return self

    @property
    def objective(self) -> Objective:
        """The objective that ``stage`` selects."""
        return OBJECTIVES[self.stage]

    def keys_of(self, objective: Objective) -> Keys:
        """The values of one objective's keys.

        Raises:
            ValueError: where the values contradict each other.
        """
        try:
            return objective.keys(**{name: getattr(self, name) for name in objective.keys.model_fields})
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def _task_fields() -> dict[str, Any]:
    fields: dict[str, Any] = {
        "stage": (
            Literal[tuple(OBJECTIVES)],
            option(DEFAULT_STAGE, effect="result", description="Preference objective to train with."),
        )
    }
    for objective in OBJECTIVES.values():
        for name, key in objective.keys.model_fields.items():
            assert name not in fields, f"{objective.stage} and another objective both declare the key {name}"
            field = copy.copy(key)
            field.json_schema_extra = {"effect": "result"}
            fields[name] = (key.annotation, field)
    weight = (
        "Weight of the supervised (SFT) term that is added to the loss: the negative log-likelihood of the chosen "
        "response, nats per token. 0 adds none."
    )
    reference = (
        "Frozen reference model of objectives that need one: a Hugging Face folder or hub id. Default: the weights "
        "that "
        "training starts from."
    )
    return fields | {
        "pref_ftx": (float, option(0.0, effect="result", ge=0, description=weight)),
        "ref_model": (str | None, option(None, effect="result", description=reference)),
    }


if TYPE_CHECKING:

    class TaskOptions(_TaskOptions):
        """Objective."""

else:
    TaskOptions = create_model("TaskOptions", __base__=_TaskOptions, __doc__="Objective.", **_task_fields())
