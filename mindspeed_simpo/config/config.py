"""The configuration: all options side by side, what they have to agree on, and the layout of the ranks.

A YAML key ``simpo_beta`` is the flag ``--simpo-beta``. Names are Megatron's and MindSpeed-LLM's wherever they have one.
Nothing heavy is imported, so that a mistake is told at once.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from mindspeed_simpo.config import supported
from mindspeed_simpo.config.options import (
    DataOptions,
    ModelOptions,
    OutputOptions,
    ParallelOptions,
    TaskOptions,
    TrainingOptions,
)
from mindspeed_simpo.errors import ConfigError


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
    def batching_in_use(self) -> Literal["padded", "packed", "prefix_shared"]:
        """``batching``, with ``auto`` resolved: the form with the fewest tokens that the layout is claimed for."""
        if self.batching != "auto":
            return self.batching
        topology, options = self._topology(data_parallel_size=1), self._claimed_options()
        if supported.refusal(topology, options | {"batching": "prefix_shared"}) is None:
            return "prefix_shared"
        return "packed" if supported.refusal(topology, options | {"batching": "packed"}) is None else "padded"

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
        """What the padded length of a sequence must be a multiple of, so that every rank gets equal parts."""
        tensor = self.tensor_model_parallel_size if self.sequence_parallel else 1
        context = 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1
        return tensor * context

    def layout(self, world_size: int) -> Layout:
        """Divide ``world_size`` ranks into the configured axes.

        Raises:
            ConfigError: where the layout does not fill the ranks, the global batch does not divide, or the parity
                matrix does not have the combination.
        """
        tensor, pipeline = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        context = self.context_parallel_size
        model_ranks = tensor * pipeline * context
        if world_size % model_ranks:
            raise ConfigError(
                f"{world_size} ranks cannot hold tensor_model_parallel_size {tensor} x pipeline_model_parallel_size "
                f"{pipeline} x context_parallel_size {context} = {model_ranks}: "
                f"start a multiple of {model_ranks} ranks (--nproc-per-node), or change the sizes"
            )
        data_parallel_size = world_size // model_ranks
        pairs_at_once = data_parallel_size * self.micro_batch_size
        if self.global_batch_size % pairs_at_once:
            raise ConfigError(
                f"global_batch_size {self.global_batch_size} is not a multiple of {pairs_at_once} = "
                f"{data_parallel_size} data-parallel ranks x micro_batch_size {self.micro_batch_size}"
            )
        num_microbatches = self.global_batch_size // pairs_at_once
        if self.num_layers_per_virtual_pipeline_stage is not None and num_microbatches % pipeline:
            raise ConfigError(
                f"num_layers_per_virtual_pipeline_stage: the interleaved schedule needs a multiple of "
                f"pipeline_model_parallel_size {pipeline} micro-batches, found {num_microbatches} = global_batch_size "
                f"{self.global_batch_size} / ({data_parallel_size} data-parallel ranks x micro_batch_size "
                f"{self.micro_batch_size})"
            )
        self._refuse_what_is_not_claimed(data_parallel_size)
        return Layout(
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            data=data_parallel_size,
            num_microbatches=num_microbatches,
        )

    def _refuse_what_is_not_claimed(self, data_parallel_size: int) -> None:
        options = self._claimed_options() | {"batching": self.batching_in_use}
        refused = supported.refusal(self._topology(data_parallel_size), options)
        if refused is not None:
            raise ConfigError(refused)

    def _topology(self, data_parallel_size: int) -> supported.Topology:
        return supported.Topology(
            tensor=self.tensor_model_parallel_size,
            context=self.context_parallel_size,
            pipeline=self.pipeline_model_parallel_size,
            data=data_parallel_size,
            sequence_parallel=self.sequence_parallel,
            virtual_stages=self.num_layers_per_virtual_pipeline_stage is not None,
            distributed_optimizer=self.use_distributed_optimizer,
        )

    def _claimed_options(self) -> dict[str, object]:
        """Values of the keys that the parity matrix varies, without ``batching``."""
        return {key: getattr(self, key) for key in supported.PLAIN if key != "batching"}


class Layout(BaseModel):
    """Degrees of each parallel axis; their product is the number of ranks."""

    model_config = ConfigDict(frozen=True)

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    num_microbatches: int = 1
