"""Qwen 3, dense: query-key norms; windows as in Qwen 2."""

from __future__ import annotations

from mindspeed_simpo.model.description import Layer, ModelDescription
from mindspeed_simpo.model.families.qwen2 import windows
from mindspeed_simpo.model.settings import Family, Settings


def describe(settings: Settings) -> ModelDescription:
    """The description of a Qwen 3 model; layers differ in their windows."""
    norm, rotation, mlp = settings.norm(), settings.rotation(), settings.mlp()
    bias = bool(settings.raw.get("attention_bias"))
    layers = [
        Layer(norm, settings.attention(window, rotation, qkv_bias=bias, o_bias=bias, qk_norm=norm), norm, mlp)
        for window in windows(settings)
    ]
    return settings.model(layers, norm)


FAMILY = Family("qwen3", "Qwen3ForCausalLM", describe)
