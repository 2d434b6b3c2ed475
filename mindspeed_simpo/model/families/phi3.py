"""Phi-3, 3.5 and 4, dense: fused projections, partial rotation of heads, ``longrope`` beyond the trained length."""

from __future__ import annotations

from mindspeed_simpo.model.description import Layer, ModelDescription
from mindspeed_simpo.model.settings import Family, Settings
from mindspeed_simpo.model.tensor_names import TensorNames

_NAMES = TensorNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))


def describe(settings: Settings) -> ModelDescription:
    """The description of a Phi-3 model; all layers are equal. Old files call ``longrope`` "su" or "yarn"."""
    norm, mlp = settings.norm(), settings.mlp()
    rotation = settings.rotation()
    attention = settings.attention(settings.hf.sliding_window, rotation)
    layers = [Layer(norm, attention, norm, mlp) for _ in range(settings.num_layers)]
    return settings.model(layers, norm, names=_NAMES)


FAMILY = Family("phi3", "Phi3ForCausalLM", describe, rotary_aliases={"su": "longrope", "yarn": "longrope"})
