"""The options of what is watched while a run trains: alarms, answers, the best checkpoint, early stopping."""

from __future__ import annotations

from pydantic import field_validator, model_validator

from mindspeed_simpo.config.options.base import Options, option

_OF_THE_METRIC = ("greater_is_better", "early_stopping_patience", "early_stopping_threshold")


class WatchOptions(Options):
    """Alarms, answers and the best checkpoint."""

    alarms: bool = option(
        True,
        effect="none",
        description="Warn, with advice, where the metrics show that a run goes wrong; docs/watching.md defines each "
        "alarm.",
    )
    alarm_logps_fall: float = option(
        0.5,
        gt=0,
        effect="none",
        description="Fall of logps/chosen since the first lines of metrics, nats per token, beyond which the alarm "
        "chosen_falls is raised.",
    )
    eval_generate: int = option(
        0,
        ge=0,
        effect="none",
        description="Number of held-out prompts that each evaluation answers, by greedy generation with the current "
        "weights, to output_dir/samples.jsonl; the first ones of the held-out pairs. Rank 0 then holds a copy of the "
        "whole model. 0 generates nothing.",
    )
    eval_generate_max_new_tokens: int = option(
        256, ge=1, effect="none", description="With eval_generate, largest number of tokens of an answer."
    )
    metric_for_best_model: str | None = option(
        None,
        effect="result",
        description="Metric of the evaluations, such as loss or rewards/accuracies, whose best value makes a "
        "checkpoint the best one: the checkpoint is written at once, kept whatever save_total_limit says, named in "
        "checkpoints/best.json, and is what export_hf exports. Default: no checkpoint is the best, and export_hf "
        "exports the last step.",
    )
    greater_is_better: bool | None = option(
        None,
        effect="result",
        description="Whether higher values of metric_for_best_model are better. Default: false for metrics whose name "
        "ends with loss, true for all others.",
    )
    early_stopping_patience: int | None = option(
        None,
        ge=1,
        effect="result",
        description="Evaluations in a row without an improvement of metric_for_best_model after which the run stops. "
        "Default: the run never stops early.",
    )
    early_stopping_threshold: float = option(
        0.0,
        ge=0,
        effect="result",
        description="With early_stopping_patience, change of the metric up to which a better value is no improvement, "
        "in the unit of the metric.",
    )

    @field_validator("metric_for_best_model")
    @classmethod
    def _is_named_as_in_the_metrics(cls, value: str | None) -> str | None:
        return value if value is None else value.removeprefix("eval_").removeprefix("eval/")

    @property
    def best_is_greater(self) -> bool:
        """``greater_is_better`` with its default, which depends on the metric's name."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not (self.metric_for_best_model or "").endswith("loss")

    @model_validator(mode="after")
    def _of_a_metric(self) -> WatchOptions:
        defaults = {name: type(self).model_fields[name].default for name in _OF_THE_METRIC}
        given = [name for name, default in defaults.items() if getattr(self, name) != default]
        if given and self.metric_for_best_model is None:
            raise ValueError(f"{', '.join(given)}: set metric_for_best_model too, such as rewards/accuracies or loss")
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError("early_stopping_threshold: set early_stopping_patience too")
        return self
