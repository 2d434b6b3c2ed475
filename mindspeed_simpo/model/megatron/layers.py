"""Description -> decoder layers, and the ``TransformerConfig`` of megatron-core."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.options import ContextParallelAlgo
from mindspeed_simpo.device import Device, operators
from mindspeed_simpo.model import description
from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.model.megatron.adapters import dropping
from mindspeed_simpo.model.megatron.attention import Attention, RowContents
from mindspeed_simpo.model.megatron.experts import Experts
from mindspeed_simpo.model.megatron.latent import LatentAttention
from mindspeed_simpo.model.megatron.linear import RMSNorm, column_parallel, row_parallel
from mindspeed_simpo.model.naming import Chunk, layers_per_pipeline_rank
from mindspeed_simpo.parallel import Groups

_ACTIVATIONS = {"silu": operators.swiglu, "gelu_tanh": operators.geglu}


class MLP(torch.nn.Module):
    """``down(activation(gate x) * up x)``; one projection computes gate and up."""

    def __init__(self, config: TransformerConfig, layer: description.MLP, groups: Groups) -> None:
        super().__init__()
        self.linear_fc1 = column_parallel(
            config.hidden_size, 2 * layer.width, config, groups, bias=layer.bias, adds_bias=False
        )
        self.activation = _ACTIVATIONS[layer.activation]
        self.linear_fc2 = row_parallel(layer.width, config.hidden_size, config, groups, bias=layer.bias)

    def forward(
        self, hidden: Float[Tensor, "held row hidden"]
    ) -> tuple[Float[Tensor, "held row hidden"], Float[Tensor, " hidden"] | None]:
        """The output of the projection, and its bias, which the caller must add; None without a bias.

        Args:
            hidden: Normalised hidden states of this rank's shard of the sequence.
        """
        result: tuple[Tensor, Tensor | None] = self.linear_fc2(self.activation(*self.linear_fc1(hidden)))
        return result


class DecoderLayer(torch.nn.Module):
    """A decoder layer that replaces megatron-core's ``TransformerLayer`` in a ``TransformerBlock``.

    ``x += norm_after(block(norm_before(x)))`` for attention and MLP.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer: description.Layer,
        groups: Groups,
        kv_group: dist.ProcessGroup | None,
        context_parallel_algo: ContextParallelAlgo,
        layer_number: int,
        **_: Any,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.input_layernorm = RMSNorm(config, config.hidden_size, layer.norm_before_attention)
        attention = Attention if layer.attention.latent is None else LatentAttention
        self.self_attention = attention(config, layer.attention, groups, kv_group, context_parallel_algo)
        self.post_attention_layernorm = self.post_mlp_layernorm = None
        if layer.norm_after_attention is not None:
            self.post_attention_layernorm = RMSNorm(config, config.hidden_size, layer.norm_after_attention)
        self.pre_mlp_layernorm = RMSNorm(config, config.hidden_size, layer.norm_before_mlp)
        self.mlp = None if layer.mlp is None else MLP(config, layer.mlp, groups)
        self.experts = None if layer.experts is None else Experts(config, layer.experts, groups)
        if layer.norm_after_mlp is not None:
            self.post_mlp_layernorm = RMSNorm(config, config.hidden_size, layer.norm_after_mlp)

    def forward(
        self, hidden_states: Float[Tensor, "held row hidden"], attention_bias: RowContents, **_: Any
    ) -> tuple[Float[Tensor, "held row hidden"], None]:
        """The residual stream after this layer, and None as the cross-attention context of megatron-core's interface.

        Args:
            hidden_states: The residual stream, this rank's shard of the sequence.
            attention_bias: Contents of the rows. The argument has this name because megatron-core
                passes only ``attention_bias`` unchanged to a layer, under recomputation too.
        """
        blocks = (
            (self.input_layernorm, self.self_attention, (attention_bias,), self.post_attention_layernorm),
            (self.pre_mlp_layernorm, self._feed_forward, (attention_bias,), self.post_mlp_layernorm),
        )
        with dropping(self, attention_bias.token_keys):
            for norm_before, block, arguments, norm_after in blocks:
                result, bias = block(norm_before(hidden_states), *arguments)
                if bias is not None:
                    result = result + bias
                if norm_after is not None:
                    result = norm_after(result)
                hidden_states = hidden_states + result
        return hidden_states, None

    def _feed_forward(self, normed: Tensor, contents: RowContents) -> tuple[Tensor, Tensor | None]:
        """The sum of MLP and experts, and the bias of the MLP."""
        if self.experts is None:
            result: tuple[Tensor, Tensor | None] = self.mlp(normed)  # type: ignore[misc]
            return result
        mixed = self.experts(normed, contents.balance)
        if self.mlp is None:
            return mixed, None
        shared, bias = self.mlp(normed)
        return mixed + shared, bias


def block_spec(
    model: ModelDescription,
    chunk: Chunk,
    groups: Groups,
    kv_groups: dict[int, dist.ProcessGroup],
    context_parallel_algo: ContextParallelAlgo,
) -> TransformerBlockSubmodules:
    """The specification of the layers of one chunk and of the final norm for megatron-core's ``TransformerBlock``.

    Args:
        model: Description of the whole model.
        chunk: The chunk to build.
        groups: Process groups of the layout.
        kv_groups: Number of ranks that share a key-value head -> this rank's group of such ranks.
        context_parallel_algo: Attention over context-parallel ranks.
    """
    layers = []
    for layer in chunk.layers(model):
        parts = layer.attention.share(groups.tensor.rank(), groups.tensor.size()).kv_parts
        params = {
            "layer": layer,
            "groups": groups,
            "kv_group": kv_groups.get(parts),
            "context_parallel_algo": context_parallel_algo,
        }
        layers.append(ModuleSpec(module=DecoderLayer, params=params))
    norm = ModuleSpec(module=RMSNorm, params={"norm": model.final_norm})
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def transformer_config(model: ModelDescription, config: Config, device: Device) -> TransformerConfig:
    """The ``TransformerConfig`` of a model and a run, which megatron-core's block, schedules and optimizer read.

    Only layers of megatron-core, which are not used, read the number of heads and the MLP width of the configuration;
    these values only need to be divisible by the tensor-parallel size.

    Args:
        model: Description of the whole model.
        config: Precision, parallel degrees and recomputation.
        device: Device of the ranks.
    """
    dtype = torch.bfloat16 if config.bf16_in_use else torch.float32
    pipeline, tensor = config.pipeline_model_parallel_size, config.tensor_model_parallel_size
    interleaved = config.num_layers_per_virtual_pipeline_stage is not None
    uneven = layers_per_pipeline_rank(model.num_layers, pipeline) if model.num_layers % pipeline else None
    with warnings.catch_warnings():
        # the warning is about fused attention of TransformerEngine, which this package never uses
        warnings.filterwarnings("ignore", message="If you are using transformer_engine")
        result = TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=tensor,
            num_query_groups=tensor,
            kv_channels=model.layers[0].attention.head_dim,
            ffn_hidden_size=tensor,
            normalization="RMSNorm",
            layernorm_epsilon=model.final_norm.eps,
            # megatron-core then sums the gradients of query-key norms over the tensor-parallel ranks
            qk_layernorm=any(layer.attention.qk_norm is not None for layer in model.layers),
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            bf16=config.bf16_in_use,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline_size(model.num_layers),
            num_layers_in_first_pipeline_stage=uneven[0] if uneven else None,
            # megatron-core 0.12 divides the layers between the first and the last rank by the number of these ranks
            num_layers_in_last_pipeline_stage=uneven[-1] if uneven and pipeline > 2 else None,
            sequence_parallel=config.sequence_parallel and config.tensor_model_parallel_size > 1,
            # no shape is exchanged: see device/receive_shapes.py
            variable_seq_lengths=pipeline > 1 and not interleaved,
            # the interleaved schedule sends forward and backward messages at once: batched, these would be matched
            # wrongly between two pipeline ranks
            overlap_p2p_comm=interleaved,
            batch_p2p_comm=not interleaved,
            # the host would wait for the device after each message, for a defect that torch no longer has
            batch_p2p_sync=False,
            # megatron-core requires this value with variable_seq_lengths, also without experts
            moe_token_dispatcher_type="alltoall",
            # gloo's isend reads its buffer after the call returns
            deallocate_pipeline_outputs=pipeline > 1 and not device.is_cpu,
            recompute_granularity=config.recompute_granularity,
            recompute_method=config.recompute_method,
            recompute_num_layers=config.recompute_num_layers,
        )
    # megatron-core has no such field; its layers are not used with it
    result.use_ascend_mc2 = config.use_ascend_mc2
    return result
