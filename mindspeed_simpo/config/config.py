"""The configuration: one frozen record of all options, and the checks across option groups.

A YAML key ``simpo_beta`` is the flag ``--simpo-beta``. Option names are those of Megatron and MindSpeed-LLM where these
have the option. The module imports no torch, so that a wrong configuration fails within a second.
"""

from __future__ import annotations

import functools

from pydantic import model_validator

from mindspeed_simpo.config import supported
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.config.options import (
    AdapterOptions,
    BatchingForm,
    DataOptions,
    ModelOptions,
    OutputOptions,
    ParallelOptions,
    TaskOptions,
    TrainingOptions,
    WatchOptions,
    effect_of,
)
from mindspeed_simpo.objectives import unknown_metric


class Config(
    TaskOptions,
    ModelOptions,
    AdapterOptions,
    DataOptions,
    TrainingOptions,
    ParallelOptions,
    OutputOptions,
    WatchOptions,
):
    """All options in one flat key space; the checks here need options of more than one group."""

    @model_validator(mode="after")
    def _token_budget_needs_packing(self) -> Config:
        if self.max_tokens_per_micro_batch is not None and self.batching_in_use == "padded":
            raise ValueError(
                "max_tokens_per_micro_batch needs batching: packed or prefix_shared; padded micro-batches hold "
                "micro_batch_size pairs"
            )
        return self

    @model_validator(mode="after")
    def _quantization_fits(self) -> Config:
        if self.quantization is not None:
            needed = {"backend": "fsdp", "init_from": "weights", "fsdp_cpu_offload": False}
            other = [f"{name}: {value}" for name, value in needed.items() if getattr(self, name) != value]
            if other:
                raise ValueError(f"quantization: {self.quantization} needs {' and '.join(other)}")
        return self

    @model_validator(mode="after")
    def _best_metric_is_evaluated(self) -> Config:
        metric = self.metric_for_best_model
        if metric is None:
            return self
        if problem := unknown_metric(metric, self.objective):
            raise ValueError(f"metric_for_best_model: {problem}")
        if not self.eval_interval or self.eval_iters == 0:
            key = "eval_interval" if not self.eval_interval else "eval_iters"
            raise ValueError(
                f"metric_for_best_model: {metric} needs evaluations while the run trains, and {key} is 0: set {key}"
            )
        return self

    @property
    def batching_in_use(self) -> BatchingForm:
        """``batching``, with ``auto`` resolved to the form with the fewest tokens that the layout supports."""
        if self.batching != "auto":
            return self.batching
        layout = self.layout_with(data=1)
        if supported.refusal(layout, self.arithmetic(batching="prefix_shared")) is None:
            return "prefix_shared"
        return "packed" if supported.refusal(layout, self.arithmetic(batching="packed")) is None else "padded"

    @property
    def token_budget(self) -> int:
        """``max_tokens_per_micro_batch`` with its default, a pair of sequences of ``seq_length``; tokens."""
        if self.max_tokens_per_micro_batch is not None:
            return self.max_tokens_per_micro_batch
        return 2 * self.seq_length

    @property
    def reference_is_base(self) -> bool:
        """Whether the reference model is the trained model without its adapters."""
        return self.objective.needs_reference and self.lora_r > 0 and self.ref_model is None

    def virtual_pipeline_size(self, num_layers: int) -> int | None:
        """Model chunks of each pipeline rank for a model of ``num_layers`` layers.

        The number is ``num_layers / (pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage)``; None
        without the interleaved schedule.
        """
        if self.num_layers_per_virtual_pipeline_stage is None:
            return None
        return num_layers // (self.pipeline_model_parallel_size * self.num_layers_per_virtual_pipeline_stage)

    @property
    def sequence_multiple(self) -> int:
        """See :attr:`Layout.sequence_multiple`."""
        return self.layout_with(data=1).sequence_multiple

    @property
    def micro_batch_multiple(self) -> int:
        """The interleaved schedule needs a multiple of ``pipeline_model_parallel_size`` micro-batches; else 1."""
        return 1 if self.num_layers_per_virtual_pipeline_stage is None else self.pipeline_model_parallel_size

    @property
    def equal_micro_batches(self) -> bool:
        """Whether all data-parallel ranks compute equally many micro-batches, because every forward is a collective.

        With ``backend: fsdp`` each forward gathers the shards of the parameters; see also
        :attr:`Layout.experts_span_data_ranks`.
        """
        return self.backend == "fsdp" or self.layout_with(data=1).experts_span_data_ranks

    def layout_with(self, data: int) -> Layout:
        """The configured layout with ``data`` data-parallel ranks; ``config.validation`` checks layouts."""
        return Layout(
            tensor=self.tensor_model_parallel_size,
            context=self.context_parallel_size,
            pipeline=self.pipeline_model_parallel_size,
            data=data,
            sequence_parallel=self.sequence_parallel,
            virtual_pipeline=self.num_layers_per_virtual_pipeline_stage is not None,
            distributed_optimizer=self.use_distributed_optimizer,
            expert=self.expert_model_parallel_size,
            expert_tensor=self.expert_tensor_parallel_size,
        )

    def arithmetic(self, **values: object) -> dict[str, object]:
        """Values of the options with ``effect="arithmetic"``, ``batching`` resolved; ``values`` override options."""
        found = {name: getattr(self, name) for name in _arithmetic_names(type(self)) if name != "batching"}
        return {"batching": values.get("batching") or self.batching_in_use} | found | values


@functools.cache
def _arithmetic_names(kind: type[Config]) -> tuple[str, ...]:
    return tuple(name for name, field in kind.model_fields.items() if effect_of(field) == "arithmetic")
