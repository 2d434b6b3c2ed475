"""Gemma 2: windows in alternate layers, soft-capped scores and logits, norms around each block, scaled embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from mindspeed_simpo.model.description import Attention, Layer, ModelDescription, Norm
from mindspeed_simpo.model.settings import Family, Settings
from mindspeed_simpo.model.tensor_names import TensorNames

NAMES = TensorNames(
    norm_after_attention="post_attention_layernorm",
    norm_before_mlp="pre_feedforward_layernorm",
    norm_after_mlp="post_feedforward_layernorm",
)


def check_direction(settings: Settings) -> None:
    """Refuse bidirectional attention.

    Raises:
        ModelError: where ``use_bidirectional_attention`` is set.
    """
    if settings.raw.get("use_bidirectional_attention"):
        raise settings.error("use_bidirectional_attention is not supported: a preference is scored left to right")


def gemma_model(settings: Settings, norm: Norm, attentions: Sequence[Attention]) -> ModelDescription:
    """Layers with a norm on both sides of each block and GeGLU, embeddings scaled by ``sqrt(hidden_size)``."""
    hf = settings.hf
    mlp = settings.mlp(key="hidden_activation", expected="gelu_pytorch_tanh")
    return settings.model(
        [Layer(norm, attention, norm, mlp, norm, norm) for attention in attentions],
        norm,
        names=NAMES,
        embedding_scale=hf.hidden_size**0.5,
        logit_softcap=hf.final_logit_softcapping,
    )


def describe(settings: Settings) -> ModelDescription:
    """The description of a Gemma 2 model; layers differ in windows, and checkpoints store norm weights minus 1."""
    check_direction(settings)
    hf, norm, rotation = settings.hf, settings.norm(weight_offset=1.0), settings.rotation()
    bias = bool(settings.raw.get("attention_bias"))
    windows = settings.windows(settings.layer_types(lambda index: index % 2 == 0))
    attentions = [
        settings.attention(
            window,
            rotation,
            scale=hf.query_pre_attn_scalar**-0.5,
            softcap=hf.attn_logit_softcapping,
            qkv_bias=bias,
            o_bias=bias,
        )
        for window in windows
    ]
    return gemma_model(settings, norm, attentions)


FAMILY = Family("gemma2", "Gemma2ForCausalLM", describe)
