"""The configuration: all options side by side, and what they have to agree on.

A YAML key ``simpo_beta`` is the flag ``--simpo-beta``. Names are Megatron's and MindSpeed-LLM's wherever they have one.
Nothing heavy is imported, so that a mistake is told at once.
"""

from __future__ import annotations

from pydantic import model_validator

from mindspeed_simpo.config import supported
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.config.options import (
    BatchingForm,
    DataOptions,
    ModelOptions,
    OutputOptions,
    ParallelOptions,
    TaskOptions,
    TrainingOptions,
    effect_of,
)


class Config(TaskOptions, ModelOptions, DataOptions, TrainingOptions, ParallelOptions, OutputOptions):
    """All options, side by side; what no single key can tell is checked here."""

    @model_validator(mode="after")
    def _budget_has_rows(self) -> Config:
        if self.max_tokens_per_micro_batch is not None and self.batching_in_use == "padded":
            raise ValueError(
                "max_tokens_per_micro_batch needs batching: packed or prefix_shared; padded micro-batches, which "
                "context parallelism and virtual stages need, hold micro_batch_size pairs"
            )
        return self

    @property
    def batching_in_use(self) -> BatchingForm:
        """``batching``, with ``auto`` resolved: the form with the fewest tokens that the layout is claimed for."""
        if self.batching != "auto":
            return self.batching
        layout = self.layout_with(data=1)
        if supported.refusal(layout, self.arithmetic(batching="prefix_shared")) is None:
            return "prefix_shared"
        return "packed" if supported.refusal(layout, self.arithmetic(batching="packed")) is None else "padded"

    @property
    def token_budget(self) -> int:
        """``max_tokens_per_micro_batch`` with its default: one pair of the longest sequences."""
        if self.max_tokens_per_micro_batch is not None:
            return self.max_tokens_per_micro_batch
        return 2 * self.seq_length

    def virtual_stages(self, num_layers: int) -> int | None:
        """Virtual stages of each pipeline stage of a model with ``num_layers`` layers; None where stages are whole."""
        if self.num_layers_per_virtual_pipeline_stage is None:
            return None
        return num_layers // (self.pipeline_model_parallel_size * self.num_layers_per_virtual_pipeline_stage)

    @property
    def sequence_multiple(self) -> int:
        """See :attr:`Layout.sequence_multiple`."""
        return self.layout_with(data=1).sequence_multiple

    def layout_with(self, data: int) -> Layout:
        """The configured axes with ``data`` data-parallel ranks; unchecked, see ``config.validation``."""
        return Layout(
            tensor=self.tensor_model_parallel_size,
            context=self.context_parallel_size,
            pipeline=self.pipeline_model_parallel_size,
            data=data,
            sequence_parallel=self.sequence_parallel,
            virtual_pipeline=self.num_layers_per_virtual_pipeline_stage is not None,
            distributed_optimizer=self.use_distributed_optimizer,
        )

    def arithmetic(self, **values: object) -> dict[str, object]:
        """Every option that changes how numbers are computed, with its value; ``values`` take the place of some."""
        names = [name for name, field in type(self).model_fields.items() if effect_of(field) == "arithmetic"]
        found = {name: getattr(self, name) for name in names if name != "batching"}
        return {"batching": values.get("batching") or self.batching_in_use} | found | values
