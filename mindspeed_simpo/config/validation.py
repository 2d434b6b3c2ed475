"""The one call that checks what a configuration, the ranks, the model and the device have to agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mindspeed_simpo.config import supported
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.errors import ConfigError


class LayerSizes(Protocol):
    """What tensor parallelism divides of a layer."""

    @property
    def num_heads(self) -> int:
        """Of queries."""

    @property
    def num_kv_heads(self) -> int:
        """Of keys and values."""

    @property
    def ffn_size(self) -> int:
        """Width of the MLP."""


def make_layout(
    config: Config, world_size: int, layers: Sequence[LayerSizes] | None = None, device: str | None = None
) -> Layout:
    """Divide ``world_size`` ranks into the configured axes, and refuse what does not divide or is not claimed.

    Args:
        config: Degrees, switches, batch sizes and the options that change the arithmetic.
        world_size: Ranks of the run.
        layers: Of the model, where it is known already.
        device: Where the run takes place, where that is known already.

    Raises:
        ConfigError: naming the keys, the numbers that do not divide and what to change.
    """
    layout = _divide(config, world_size)
    _check_batch(config, layout)
    if layers is not None:
        _check_pipeline(config, layout, len(layers))
        for sizes in layers:
            _check_layer(config, layout, sizes)
    _check_context(config, device or config.device)
    refused = supported.refusal(layout, config.arithmetic())
    if refused is not None:
        raise ConfigError(refused)
    return layout


def _divide(config: Config, world_size: int) -> Layout:
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    context = config.context_parallel_size
    model_ranks = tensor * pipeline * context
    if world_size % model_ranks:
        raise ConfigError(
            f"{world_size} ranks cannot hold tensor_model_parallel_size {tensor} x pipeline_model_parallel_size "
            f"{pipeline} x context_parallel_size {context} = {model_ranks}: "
            f"start a multiple of {model_ranks} ranks (--nproc-per-node), or change the sizes"
        )
    return config.layout_with(data=world_size // model_ranks)


def _check_batch(config: Config, layout: Layout) -> None:
    pairs_at_once = layout.data * config.micro_batch_size
    if config.global_batch_size % pairs_at_once:
        raise ConfigError(
            f"global_batch_size {config.global_batch_size} is not a multiple of {pairs_at_once} = "
            f"{layout.data} data-parallel ranks x micro_batch_size {config.micro_batch_size}"
        )
    num_microbatches = config.global_batch_size // pairs_at_once
    if layout.virtual_pipeline and num_microbatches % layout.pipeline:
        raise ConfigError(
            f"num_layers_per_virtual_pipeline_stage: the interleaved schedule needs a multiple of "
            f"pipeline_model_parallel_size {layout.pipeline} micro-batches, found {num_microbatches} = "
            f"global_batch_size {config.global_batch_size} / ({layout.data} data-parallel ranks x micro_batch_size "
            f"{config.micro_batch_size})"
        )


def _check_pipeline(config: Config, layout: Layout, num_layers: int) -> None:
    per_stage = config.num_layers_per_virtual_pipeline_stage
    if num_layers < layout.pipeline:
        raise ConfigError(
            f"pipeline_model_parallel_size {layout.pipeline} is more than the model's num_hidden_layers {num_layers}"
        )
    if per_stage is not None and num_layers % (layout.pipeline * per_stage):
        raise ConfigError(
            f"num_layers_per_virtual_pipeline_stage {per_stage} x pipeline_model_parallel_size {layout.pipeline} does "
            f"not divide the model's num_hidden_layers {num_layers}"
        )


def _check_layer(config: Config, layout: Layout, sizes: LayerSizes) -> None:
    ranks = layout.tensor
    for name, count in (("num_attention_heads", sizes.num_heads), ("intermediate_size", sizes.ffn_size)):
        if count % ranks:
            raise ConfigError(
                f"tensor_model_parallel_size {ranks} does not divide the model's {name} {count}: "
                f"choose a divisor of {count}"
            )
    if sizes.num_kv_heads % ranks:
        raise ConfigError(
            f"tensor_model_parallel_size {ranks} does not divide the model's num_key_value_heads "
            f"{sizes.num_kv_heads}: choose a divisor of {sizes.num_kv_heads}"
        )
    heads, groups, context = sizes.num_heads // ranks, sizes.num_kv_heads // ranks, layout.context
    ulysses = config.context_parallel_algo == "ulysses_cp_algo"
    if ulysses and (heads % context or (groups % context and context % groups)):
        raise ConfigError(
            f"context_parallel_algo: ulysses_cp_algo divides the heads of a tensor-parallel rank ({heads} and "
            f"{groups} of keys) over context_parallel_size {context}, which is impossible: choose another size or "
            "context_parallel_algo: megatron_cp_algo"
        )


def _check_context(config: Config, device: str) -> None:
    if config.context_parallel_algo != "gathered" and device in ("cpu", "cuda"):
        raise ConfigError(
            f"context_parallel_algo: {config.context_parallel_algo} is MindSpeed's and runs on npu; this is "
            f"{device}: set context_parallel_algo: gathered"
        )
