"""Validation of a configuration against the number of ranks, the model and the device, in one call."""

from __future__ import annotations

from mindspeed_simpo.config import supported
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout, names_of
from mindspeed_simpo.config.model_sizes import AttentionSizes, DividedModel, ExpertSizes, LayerSizes, Model
from mindspeed_simpo.errors import ConfigError

FUSED_RANKS = (2, 4, 8)
"""Tensor-parallel ranks that ``npu_all_gather_base_mm`` and ``npu_mm_reduce_scatter_base`` take: on the Atlas A3 also
16 and 32, which MindSpeed excludes."""
FUSED_AXIS = range(256, 65535)
"""Elements of a summed axis that these operators take."""


def make_layout(
    config: Config, world_size: int, model: DividedModel | None = None, device: str | None = None
) -> Layout:
    """The parallel layout of ``world_size`` ranks; data parallelism takes what the configured degrees leave.

    Args:
        config: Degrees, switches, batch sizes and the options that change the arithmetic.
        world_size: Number of ranks of the run.
        model: Description of the model; None leaves out the checks of the model.
        device: ``npu``, ``cuda`` or ``cpu``; None takes ``config.device``.

    Raises:
        ConfigError: where sizes do not divide or the combination is not supported; the message names the keys, the
            numbers and what to change.
    """
    layout = _divide(config, world_size)
    _check_batch(config, layout)
    _check_device(config, device or config.device, model)
    if config.backend == "fsdp":
        _check_fsdp(config, layout, device or config.device)
    elif model is not None:
        _check_pipeline(config, layout, len(model.layers))
        # equal layers of a description are one object
        for layer in {id(layer): layer for layer in model.layers}.values():
            _check_layer(config, layout, layer)
        if all(layer.experts is None for layer in model.layers):
            _check_dense(config, layout)
        _check_prefixes(config, model)
    if config.use_ascend_mc2:
        _check_fused_products(config, layout, device or config.device, model)
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
    layout = config.layout_with(data=world_size // model_ranks)
    expert_ranks = layout.expert * layout.expert_tensor_ranks
    if (world_size // pipeline) % expert_ranks:
        raise ConfigError(
            f"{world_size} ranks cannot hold expert_model_parallel_size {layout.expert} x expert_tensor_parallel_size "
            f"{layout.expert_tensor_ranks} (default: tensor_model_parallel_size) x pipeline_model_parallel_size "
            f"{pipeline} = {expert_ranks * pipeline}: start a multiple of that many ranks (--nproc-per-node), or "
            "change the sizes"
        )
    return layout


def _check_batch(config: Config, layout: Layout) -> None:
    pairs_at_once = layout.data * config.micro_batch_size
    if config.global_batch_size % pairs_at_once:
        raise ConfigError(
            f"global_batch_size {config.global_batch_size} is not a multiple of {pairs_at_once} = "
            f"{layout.data} data-parallel ranks x micro_batch_size {config.micro_batch_size}"
        )
    num_microbatches = config.global_batch_size // pairs_at_once
    if config.batching_in_use == "padded" and layout.virtual_pipeline and num_microbatches % layout.pipeline:
        raise ConfigError(
            f"num_layers_per_virtual_pipeline_stage: the interleaved schedule needs a multiple of "
            f"pipeline_model_parallel_size {layout.pipeline} micro-batches, found {num_microbatches} = "
            f"global_batch_size {config.global_batch_size} / ({layout.data} data-parallel ranks x micro_batch_size "
            f"{config.micro_batch_size})"
        )


def _check_fsdp(config: Config, layout: Layout, device: str) -> None:
    if config.fsdp_shard_size is not None and layout.ranks % config.fsdp_shard_size:
        raise ConfigError(
            f"fsdp_shard_size {config.fsdp_shard_size} does not divide the {layout.ranks} ranks: choose a divisor"
        )
    if config.moe_aux_loss_coeff:
        raise ConfigError("moe_aux_loss_coeff: backend: fsdp adds no auxiliary loss: remove the key")
    if config.quantization is not None and device == "npu":
        raise ConfigError(
            f"quantization: {config.quantization}: bitsandbytes has no kernels for device: npu: remove the key"
        )


def _check_pipeline(config: Config, layout: Layout, num_layers: int) -> None:
    layers_per_chunk = config.num_layers_per_virtual_pipeline_stage
    if num_layers < layout.pipeline:
        raise ConfigError(
            f"pipeline_model_parallel_size {layout.pipeline} is more than the model's num_hidden_layers {num_layers}"
        )
    if layers_per_chunk is not None and num_layers % (layout.pipeline * layers_per_chunk):
        raise ConfigError(
            f"num_layers_per_virtual_pipeline_stage {layers_per_chunk} x pipeline_model_parallel_size "
            f"{layout.pipeline} does "
            f"not divide the model's num_hidden_layers {num_layers}"
        )


def _check_layer(config: Config, layout: Layout, layer: LayerSizes) -> None:
    ranks, attention = layout.tensor, layer.attention
    if layer.mlp is not None and layer.mlp.width % ranks:
        raise ConfigError(
            f"tensor_model_parallel_size {ranks} does not divide the model's intermediate_size {layer.mlp.width}: "
            f"choose a divisor of {layer.mlp.width}"
        )
    if layer.experts is not None:
        _check_experts(layout, layer.experts)
    if ranks > attention.heads:
        raise ConfigError(
            f"tensor_model_parallel_size {ranks} is more than the model's num_attention_heads {attention.heads}: "
            "every rank needs a head"
        )
    if attention.kv_heads % ranks:
        _check_shared_heads(ranks, attention)
    if layout.context > 1:
        _check_context_algorithm(config, layout, attention)


def _check_experts(layout: Layout, experts: ExpertSizes) -> None:
    if experts.number % layout.expert:
        raise ConfigError(
            f"expert_model_parallel_size {layout.expert} does not divide the model's {experts.number} experts: choose "
            f"a divisor of {experts.number}"
        )
    if experts.width % layout.expert_tensor_ranks:
        raise ConfigError(
            f"expert_tensor_parallel_size {layout.expert_tensor_ranks} (default: tensor_model_parallel_size) does not "
            f"divide the size of the model's experts, {experts.width}: choose a divisor of {experts.width}"
        )


def _check_dense(config: Config, layout: Layout) -> None:
    if config.moe_aux_loss_coeff:
        raise ConfigError(
            f"moe_aux_loss_coeff {config.moe_aux_loss_coeff}: {config.model_name_or_path} has no experts; remove the "
            "key"
        )
    if layout.axes & {"EP", "ETP"}:
        raise ConfigError(
            f"{names_of(layout.axes & {'EP', 'ETP'})}: {config.model_name_or_path} has no experts; remove the key"
        )


def _check_shared_heads(ranks: int, attention: AttentionSizes) -> None:
    kv_heads = attention.kv_heads
    if ranks % kv_heads:
        raise ConfigError(
            f"tensor_model_parallel_size {ranks} neither divides the model's num_key_value_heads {kv_heads} nor is "
            f"a multiple of it: choose a divisor or a multiple of {kv_heads}"
        )
    if attention.head_dim % (ranks // kv_heads):
        raise ConfigError(
            f"tensor_model_parallel_size {ranks}: {ranks // kv_heads} ranks share each of the model's {kv_heads} "
            f"num_key_value_heads, which does not divide its head_dim {attention.head_dim}: choose another degree"
        )


def _check_context_algorithm(config: Config, layout: Layout, attention: AttentionSizes) -> None:
    algorithm, tensor, context = config.context_parallel_algo, layout.tensor, layout.context
    advice = "choose another size or context_parallel_algo: megatron_cp_algo"
    if algorithm == "megatron_cp_algo" and attention.window is not None and attention.window < config.seq_length:
        raise ConfigError(
            f"context_parallel_algo: {algorithm} cannot attend within the model's sliding window of "
            f"{attention.window} tokens, which seq_length {config.seq_length} exceeds: set context_parallel_algo: "
            "gathered"
        )
    if algorithm == "megatron_cp_algo" and attention.sinks:
        raise ConfigError(
            f"context_parallel_algo: {algorithm} has no attention sinks, which {config.model_name_or_path} has: set "
            "context_parallel_algo: gathered"
        )
    if algorithm != "ulysses_cp_algo":
        return
    if tensor > attention.kv_heads:
        raise ConfigError(
            f"context_parallel_algo: {algorithm} cannot divide key-value heads that tensor-parallel ranks share "
            f"(tensor_model_parallel_size {tensor}, num_key_value_heads {attention.kv_heads}): {advice}"
        )
    heads, groups = attention.heads // tensor, attention.kv_heads // tensor
    if heads % context or (groups % context and context % groups):
        raise ConfigError(
            f"context_parallel_algo: {algorithm} divides the heads of a tensor-parallel rank ({heads} and "
            f"{groups} of keys) over context_parallel_size {context}, which is impossible: {advice}"
        )


def _check_prefixes(config: Config, model: Model) -> None:
    if config.batching_in_use == "prefix_shared" and not model.shares_prefixes(config.seq_length):
        raise ConfigError(
            f"batching: prefix_shared computes the rotary embedding of a prompt once for both responses, but that of "
            f"{config.model_name_or_path} depends on the length of each sequence beyond the length that the model was "
            f"first trained for: set batching: packed, or a seq_length ({config.seq_length}) of at most that length"
        )


def _check_fused_products(config: Config, layout: Layout, device: str, model: DividedModel | None) -> None:
    """Source: :mod:`mindspeed_simpo.device.npu_mc2`."""
    if device in ("cpu", "cuda"):
        raise ConfigError(f"use_ascend_mc2: its operators are torch_npu's and run on npu; this is {device}: remove it")
    if layout.tensor not in FUSED_RANKS or not layout.sequence_parallel:
        raise ConfigError(
            f"use_ascend_mc2: its operators divide a sequence over 2, 4 or 8 ranks; found tensor_model_parallel_size "
            f"{layout.tensor}{'' if layout.sequence_parallel else ' without sequence_parallel'}: set "
            "sequence_parallel: true and one of these sizes, or remove use_ascend_mc2"
        )
    if model is None:
        return
    if not config.bf16_in_use:
        raise ConfigError("use_ascend_mc2: its operators take no fp32: set bf16: true, or remove use_ascend_mc2")
    for name, size in model.sharded_axes(layout.tensor):
        if size not in FUSED_AXIS:
            raise ConfigError(
                f"use_ascend_mc2: its operators sum over {FUSED_AXIS.start} to {FUSED_AXIS.stop - 1} elements; found "
                f"{size}, the {name} of {config.model_name_or_path} on one of {layout.tensor} tensor-parallel ranks: "
                "choose another tensor_model_parallel_size, or remove use_ascend_mc2"
            )


def _check_device(config: Config, device: str, model: Model | None) -> None:
    if config.context_parallel_algo != "gathered" and device in ("cpu", "cuda"):
        raise ConfigError(
            f"context_parallel_algo: {config.context_parallel_algo} is MindSpeed's and runs on npu; this is "
            f"{device}: set context_parallel_algo: gathered"
        )
    if device == "npu" and model is not None and any(layer.attention.softcap is not None for layer in model.layers):
        raise ConfigError(
            f"{config.model_name_or_path} caps its attention scores, for which torch_npu has no operator: "
            "set device: cuda or cpu, or choose another model"
        )
