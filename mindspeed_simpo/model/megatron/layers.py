"""Layer specification and ``TransformerConfig``: megatron-core's own layers without TransformerEngine."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from jaxtyping import Float
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn.functional import silu

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.options import ContextParallelAlgo
from mindspeed_simpo.device import Device, operators
from mindspeed_simpo.model.description import ModelSpec
from mindspeed_simpo.model.megatron.attention import CausalAttention
from mindspeed_simpo.model.naming import layers_by_stage
from mindspeed_simpo.parallel import Groups


class RMSNorm(torch.nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last axis; normalised in fp32, scaled in the input's dtype.

    That is transformers' rounding. megatron-core's wrapper of ``torch.nn.RMSNorm`` refuses sequence parallelism and
    rounds otherwise in bfloat16.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Normalise each vector of the last axis."""
        return operators.rms_norm(hidden, self.weight, self.eps)


class BiasedColumnParallelLinear(ColumnParallelLinear):  # type: ignore[misc]
    """Has a bias whatever the layer asks: ``TransformerConfig`` has one switch where models differ by projection."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:  # noqa: ARG002
        super().__init__(*args, bias=True, **kwargs)


class BiasedRowParallelLinear(RowParallelLinear):  # type: ignore[misc]
    """See :class:`BiasedColumnParallelLinear`."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:  # noqa: ARG002
        super().__init__(*args, bias=True, **kwargs)


def transformer_config(spec: ModelSpec, config: Config, device: Device) -> TransformerConfig:
    """megatron-core's view of the model and the run: dropout off, weights left to the loader."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    stages = config.pipeline_model_parallel_size
    interleaved = config.num_layers_per_virtual_pipeline_stage is not None
    uneven = layers_by_stage(spec.num_layers, stages) if spec.num_layers % stages else None
    with warnings.catch_warnings():
        # "core_attn may be TransformerEngine's fused one": here it never is
        warnings.filterwarnings("ignore", message="If you are using transformer_engine")
        return TransformerConfig(
            num_layers=spec.num_layers,
            hidden_size=spec.hidden_size,
            num_attention_heads=spec.num_heads,
            num_query_groups=spec.num_kv_heads,
            kv_channels=spec.head_dim,
            ffn_hidden_size=spec.ffn_size,
            normalization="RMSNorm",
            layernorm_epsilon=spec.rms_eps,
            qk_layernorm=spec.qk_norm,
            gated_linear_unit=True,
            activation_func=silu,
            add_bias_linear=False,
            add_qkv_bias=spec.qkv_bias,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bias_activation_fusion=True,  # calls device.operators
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            bf16=config.bf16,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=config.virtual_stages(spec.num_layers),
            num_layers_in_first_pipeline_stage=uneven[0] if uneven else None,
            num_layers_in_last_pipeline_stage=uneven[-1] if uneven else None,
            sequence_parallel=config.sequence_parallel and config.tensor_model_parallel_size > 1,
            variable_seq_lengths=stages > 1 and not interleaved,
            # the interleaved schedule sends both ways at once: between two stages batched messages would cross
            overlap_p2p_comm=interleaved,
            batch_p2p_comm=not interleaved,
            # what variable lengths ask of every model, experts or not
            moe_token_dispatcher_type="alltoall",
            # gloo's isend reads its buffer after the call returns
            deallocate_pipeline_outputs=stages > 1 and not device.is_cpu,
            recompute_granularity=config.recompute_granularity,
            recompute_method=config.recompute_method,
            recompute_num_layers=config.recompute_num_layers,
        )


def block_spec(
    spec: ModelSpec, num_layers: int, groups: Groups, context_parallel_algo: ContextParallelAlgo
) -> TransformerBlockSubmodules:
    """``num_layers`` layers of this model and the final norm."""
    layer = _layer_spec(spec, {"context_group": groups.context, "context_parallel_algo": context_parallel_algo})
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def _layer_spec(spec: ModelSpec, attention_params: dict[str, Any]) -> ModuleSpec:
    qk_norm = RMSNorm if spec.qk_norm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ModuleSpec(module=CausalAttention, params=attention_params),
            linear_proj=BiasedRowParallelLinear if spec.o_bias else RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    # Newer lines of megatron-core warn where an MLP is not told its width; older ones do not take it
    takes_width = "ffn_hidden_size" in inspect.signature(MLP.__init__).parameters
    mlp = ModuleSpec(
        module=MLP,
        params={"ffn_hidden_size": spec.ffn_size} if takes_width else {},
        submodules=MLPSubmodules(
            linear_fc1=BiasedColumnParallelLinear if spec.mlp_bias else ColumnParallelLinear,
            linear_fc2=BiasedRowParallelLinear if spec.mlp_bias else RowParallelLinear,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
