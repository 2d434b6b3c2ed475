"""How trials are drawn: Optuna's TPE, which leaves out combinations that have been drawn before."""

from __future__ import annotations

import json
import random
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial

from mindspeed_simpo.studies.sweep.plan import MAX_COMBINATIONS, Plan


class UnseenSampler(TPESampler):
    """The tree-structured Parzen estimator; where all parameters have choices, no combination is drawn twice.

    A training repeated with the same values gives the same result, so that a repetition would be a wasted trial.
    """

    def __init__(self, plan: Plan, seed: int) -> None:
        """Prepare.

        Args:
            plan: The checked sweep.
            seed: Seed of the draws.
        """
        super().__init__(seed=seed)
        self._draw = random.Random(seed)
        small = not plan.space.search and plan.combination_count <= MAX_COMBINATIONS
        self._space = (
            {name: CategoricalDistribution(choices) for name, choices in plan.choices.items()} if small else {}
        )
        self._combinations = plan.combinations() if small else []

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters where they are drawn together."""
        if self._space:
            return dict(self._space)
        return super().infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A combination by TPE, or a random one of those that are left where that one was drawn before."""
        if trial.system_attrs.get("fixed_params") or trial.params:
            return {}
        drawn = super().sample_relative(study, trial, search_space)
        if not self._space:
            return drawn
        others = [other.params for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        seen = {json.dumps(params, sort_keys=True) for params in others}
        if len(drawn) == len(self._space) and json.dumps(drawn, sort_keys=True) not in seen:
            return drawn
        left = [params for params in self._combinations if json.dumps(params, sort_keys=True) not in seen]
        return dict(self._draw.choice(left or self._combinations))
