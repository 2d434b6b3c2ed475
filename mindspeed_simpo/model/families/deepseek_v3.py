"""DeepSeek-V3: multi-head latent attention; experts chosen within groups of experts, beside a shared expert."""

from __future__ import annotations

from mindspeed_simpo.model.description import Attention, Latent, ModelDescription, Norm
from mindspeed_simpo.model.settings import Family, Settings

_LATENT_EPS = 1e-6
"""Of the norms of the latent vectors, whatever ``rms_norm_eps``; as in transformers."""


def describe(settings: Settings) -> ModelDescription:
    """The description of a DeepSeek-V3 model; the layers from ``first_k_dense_replace`` on have experts.

    The layers of multi-token prediction that published checkpoints have after the last layer are not part of it.

    Raises:
        ModelError: where ``num_key_value_heads`` is not ``num_attention_heads``.
    """
    return settings.model(settings.dense_then_experts(_attention(settings)), settings.norm())


def _attention(settings: Settings) -> Attention:
    hf = settings.hf
    heads, bias = hf.num_attention_heads, bool(hf.attention_bias)
    if hf.num_key_value_heads != heads:
        raise settings.error(
            f"num_key_value_heads {hf.num_key_value_heads} is not num_attention_heads {heads}: every head of a latent "
            "attention has its own keys and values"
        )
    rotation = settings.rotation(interleaved=bool(hf.rope_interleave), dims=hf.qk_rope_head_dim)
    latent = Latent(hf.q_lora_rank, hf.kv_lora_rank, hf.v_head_dim, Norm(_LATENT_EPS), bias)
    head_dim = hf.qk_nope_head_dim + hf.qk_rope_head_dim
    scale = head_dim**-0.5 * settings.score_factor() ** 2
    return Attention(heads, heads, head_dim, scale, rotation, o_bias=bias, latent=latent)


FAMILY = Family("deepseek_v3", "DeepseekV3ForCausalLM", describe, ignores_layers_beyond=True)
