"""Llama 2 and 3, and models of the same architecture."""

from __future__ import annotations

from mindspeed_simpo.model.description import Layer, ModelDescription
from mindspeed_simpo.model.settings import Family, Settings


def describe(settings: Settings) -> ModelDescription:
    """The description of a Llama model; all layers are equal, with biases by ``attention_bias`` and ``mlp_bias``."""
    norm, bias = settings.norm(), bool(settings.raw.get("attention_bias"))
    attention = settings.attention(None, settings.rotation(), qkv_bias=bias, o_bias=bias)
    mlp = settings.mlp(bias=bool(settings.raw.get("mlp_bias")))
    return settings.model([Layer(norm, attention, norm, mlp) for _ in range(settings.num_layers)], norm)


FAMILY = Family("llama", "LlamaForCausalLM", describe)
