"""The plan of a sweep: space, configuration, objective and bound, checked before anything starts."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.file import load_config, read_configuration, require_training_data, validate
from mindspeed_simpo.config.options import effect_of
from mindspeed_simpo.config.recipes import configuration_path
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.objectives import OBJECTIVES, unknown_metric
from mindspeed_simpo.studies.sweep.space import POINT, Space, label

MAX_COMBINATIONS = 1000
"""Combinations of a grid that are all run, or all checked where trials are drawn."""
CHOSEN = "logps/chosen"
"""The metric whose fall is bounded, nats per token."""
CONFIG_FILE = "sweep.yaml"
"""The configuration of a trial, in its folder; ``config.yaml`` is what the training makes of it."""
_LOWER_IS_BETTER = ("loss", "sft_loss")

Params = dict[str, Any]
"""Name of a parameter -> value, as Optuna stores them."""


@dataclass(frozen=True)
class Goal:
    """What the trials are compared by."""

    metric: str
    """A metric of the held-out pairs, after the last step."""
    minimize: bool
    """Whether a lower value is better."""
    max_fall: float
    """Bound on the fall of ``logps/chosen`` from step 0 to the last step, nats per token; infinite for none."""

    @property
    def direction(self) -> str:
        """The direction as Optuna names it."""
        return "minimize" if self.minimize else "maximize"


@dataclass(frozen=True)
class Plan:
    """A sweep that has passed every check that needs no data."""

    source: str
    """CONFIG of the command line."""
    values: Mapping[str, Any]
    """The keys of the configuration file and of the flags, unvalidated."""
    flags: Mapping[str, Any]
    """The keys that flags of the command line set."""
    base: Config
    """The configuration with the values of the first combination."""
    space: Space
    goal: Goal
    trials: int | None
    """Trials that are drawn, of a grid at most its combinations; None runs each combination once."""

    @property
    def folder(self) -> Path:
        """The folder of the sweep."""
        return Path(self.base.output_dir)

    @property
    def size(self) -> int:
        """Number of trials."""
        if self.trials is not None and self.space.search:
            return self.trials
        return min(self.trials or self.combination_count, self.combination_count)

    @property
    def combination_count(self) -> int:
        """Number of combinations of the choices."""
        return math.prod(len(choices) for choices in self.choices.values())

    @property
    def choices(self) -> dict[str, list[Any]]:
        """Parameter -> its choices as Optuna stores them, of the parameters that have choices."""
        points = {POINT: list(self.space.points)} if self.space.points else {}
        return points | {key: [label(value) for value in values] for key, values in self.space.grid.items()}

    def combinations(self) -> list[Params]:
        """Every combination of the choices; the last parameter changes fastest."""
        names = list(self.choices)
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*self.choices.values())]

    def keys_of(self, params: Params) -> dict[str, Any]:
        """The keys of a combination with their values."""
        keys: dict[str, Any] = {}
        for name, value in params.items():
            if name == POINT:
                keys |= self.space.points[value]
            elif name in self.space.grid:
                keys[name] = next(item for item in self.space.grid[name] if _same(label(item), value))
            else:
                keys[name] = value
        return keys

    def config_of(self, params: Params) -> Config:
        """The validated configuration of a combination.

        Raises:
            ConfigError: naming the flag or the entry whose value is wrong.
        """
        keys = self.keys_of(params)
        try:
            return validate({**self.values, **keys}, where=self.source, flags=[*self.flags, *keys])
        except ConfigError as error:
            lines = [self._named(line, params) for line in str(error).splitlines()]
            raise ConfigError("\n".join(lines)) from None

    def _named(self, line: str, params: Params) -> str:
        for key, origin in self.space.origins.items():
            flag = f"--{key.replace('_', '-')}: "
            if line.startswith(flag):
                return f"{origin}: {line.removeprefix(flag)}"
        return f"{line} (with {describe(params)})"

    def identity(self) -> dict[str, Any]:
        """What must be equal for a sweep to go on: names -> plain values."""
        base = self.base.model_dump(mode="json")
        fields = Config.model_fields
        fixed = {key: base[key] for key in fields if effect_of(fields[key]) == "result" and key not in self.space.keys}
        swept: dict[str, Any] = {f"values of {key}": list(values) for key, values in self.space.grid.items()}
        swept |= {f"range of {key}": vars(found) for key, found in self.space.search.items()}
        if self.space.points:
            swept["points"] = {name: dict(keys) for name, keys in self.space.points.items()}
        rest = {"eval_iters": base["eval_iters"], "metric": self.goal.metric, "direction": self.goal.direction}
        rest |= {"max-logps-fall": str(self.goal.max_fall), "trials": "drawn" if self.trials else "each combination"}
        return json.loads(json.dumps(fixed | swept | rest))  # type: ignore[no-any-return]


def make_plan(source: str, flags: Mapping[str, Any], space: Space, goal: Goal, trials: int | None, ranks: int) -> Plan:
    """Check a sweep.

    Args:
        source: CONFIG of the command line.
        flags: The keys that flags of the command line set.
        space: What is swept.
        goal: What the trials are compared by.
        trials: Trials to draw; None for each combination of the grid once.
        ranks: Ranks of each trial.

    Raises:
        ConfigError: where a value of any combination is wrong, two combinations are the same training, a key has no
            effect, or there are no held-out pairs.
    """
    path = configuration_path(source)
    values = read_configuration(path) | dict(flags)
    for key, origin in space.origins.items():
        if key in flags:
            raise ConfigError(f"--{key.replace('_', '-')}: `{key}` is swept by {origin}: give it once")
    plan = Plan(source, values, flags, Config.model_construct(), space, goal, trials)
    _check_number(plan.combination_count, trials, space)
    configs = []
    for params in _checked(plan):
        config = plan.config_of(params)
        make_layout(config, ranks)
        configs.append((params, config))
    plan = Plan(source, values, flags, configs[0][1], space, goal, trials)
    require_training_data(plan.base, source)
    _check_effects(space, [config for _, config in configs])
    if not space.search:
        _check_differ(configs)
    _check_held_out(plan)
    _check_metric(goal, [config for _, config in configs])
    return plan


def describe(params: Params) -> str:
    """A combination in one line."""
    return ", ".join(f"{name} {show(value)}" for name, value in params.items())


def show(value: Any) -> str:
    """A value as a configuration file has it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def better(metric: str) -> str:
    """The usual direction of a metric: ``minimize`` for losses, else ``maximize``."""
    return "minimize" if metric.rpartition("/")[2] in _LOWER_IS_BETTER else "maximize"


def write_config(plan: Plan, params: Params, folder: Path) -> None:
    """Write the configuration file of a trial: the keys that are set, its output folder, and ``load: auto``.

    Raises:
        ConfigError: where the combination is not valid, or the folder holds another training, with whose checkpoint
            ``load: auto`` would go on.
    """
    config, path = plan.config_of(params), folder / CONFIG_FILE
    if path.exists():
        earlier = load_config(path)
        fields = Config.model_fields
        results = [key for key in fields if effect_of(fields[key]) == "result"]
        if other := [key for key in results if getattr(earlier, key) != getattr(config, key)]:
            raise ConfigError(
                f"{folder} holds a training of another sweep, with {other[0]}: {getattr(earlier, other[0])} (now "
                f"{getattr(config, other[0])}); remove the folder and give --retry-failed, or give another --output-dir"
            )
    keys = config.model_dump(mode="json", exclude_unset=True) | {"output_dir": str(folder), "load": "auto"}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(keys, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _check_number(number: int, trials: int | None, space: Space) -> None:
    if trials is None and space.search:
        first = next(iter(space.search))
        raise ConfigError(f"{space.origins[first]}: a range has no end of values: say how many to draw by --trials N")
    if trials is None and number > MAX_COMBINATIONS:
        raise ConfigError(f"the grid has {number} combinations, more than {MAX_COMBINATIONS}: draw some by --trials N")


def _checked(plan: Plan) -> Iterator[Params]:
    """The combinations to check: all, or, where there are too many, each choice once; ranges by their ends."""
    ends = [{key: found.low for key, found in plan.space.search.items()}]
    ends += [{key: found.high for key, found in plan.space.search.items()}] * bool(plan.space.search)
    if plan.combination_count <= MAX_COMBINATIONS:
        for params in plan.combinations():
            for end in ends:
                yield params | end
        return
    first = {name: choices[0] for name, choices in plan.choices.items()}
    for name, choices in plan.choices.items():
        for choice in choices:
            yield first | {name: choice} | ends[0]
    yield first | ends[-1]


def _check_effects(space: Space, configs: Sequence[Config]) -> None:
    """Refuse the keys of an objective that no trial trains with."""
    stages = {config.stage for config in configs}
    for objective in OBJECTIVES.values():
        for key in objective.keys.model_fields:
            if key in space.origins and objective.stage not in stages:
                raise ConfigError(f"{space.origins[key]}: `{key}` has no effect with stage: {', '.join(stages)}")


def _check_differ(configs: Sequence[tuple[Params, Config]]) -> None:
    """Refuse two combinations that are the same training."""
    seen: dict[str, Params] = {}
    for params, config in configs:
        others = {
            key for found in OBJECTIVES.values() if found is not config.objective for key in found.keys.model_fields
        }
        text = json.dumps(config.model_dump(mode="json", exclude=others), sort_keys=True)
        if text in seen:
            raise ConfigError(
                f"{describe(seen[text])} and {describe(params)} are the same training; list what differs as points "
                "of a --file"
            )
        seen[text] = params


def _check_held_out(plan: Plan) -> None:
    config = plan.base
    if config.eval_iters == 0:
        raise ConfigError("eval_iters: 0 means no evaluation, and the trials are compared by the held-out pairs")
    if config.eval_data_path is not None:
        return
    if "data_path" in plan.space.keys:
        raise ConfigError(
            f"{plan.space.origins['data_path']}: the held-out pairs would be part of each trial's own data_path; set "
            "eval_data_path, by which all trials are compared"
        )
    from mindspeed_simpo.data.dataset import has_eval_data

    if not has_eval_data(config):
        raise ConfigError(
            f"{plan.source}: no held-out pairs, by which the trials are compared: set eval_data_path, or give split a "
            "second weight, such as 95,5"
        )


def _check_metric(goal: Goal, configs: Sequence[Config]) -> None:
    for config in configs:
        if problem := unknown_metric(goal.metric, config.objective):
            raise ConfigError(f"--metric: {problem}")
