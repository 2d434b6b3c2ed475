"""GLM-4 (0414), dense: interleaved rotation of half of each head, norms before and after each block."""

from __future__ import annotations

from mindspeed_simpo.model.description import Layer, ModelDescription
from mindspeed_simpo.model.settings import Family, Settings
from mindspeed_simpo.model.tensor_names import TensorNames

_NAMES = TensorNames(
    gate_up=("mlp.gate_up_proj",),
    norm_after_attention="post_self_attn_layernorm",
    norm_after_mlp="post_mlp_layernorm",
)


def describe(settings: Settings) -> ModelDescription:
    """The description of a GLM-4 model; all layers are equal."""
    norm, mlp = settings.norm(), settings.mlp()
    rotation = settings.rotation(partial=0.5, interleaved=True)
    attention = settings.attention(None, rotation, qkv_bias=bool(settings.hf.attention_bias))
    layers = [Layer(norm, attention, norm, mlp, norm, norm) for _ in range(settings.num_layers)]
    return settings.model(layers, norm, names=_NAMES)


FAMILY = Family("glm4", "Glm4ForCausalLM", describe)
