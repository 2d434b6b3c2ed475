"""Mistral: every layer has the same sliding window, or none has one."""

from __future__ import annotations

from mindspeed_simpo.model.description import Layer, ModelDescription
from mindspeed_simpo.model.settings import Family, Settings


def describe(settings: Settings) -> ModelDescription:
    """All layers alike."""
    norm = settings.norm()
    attention = settings.attention(settings.hf.sliding_window, settings.rotation())
    mlp = settings.mlp()
    return settings.model([Layer(norm, attention, norm, mlp) for _ in range(settings.num_layers)], norm)


FAMILY = Family("mistral", "MistralForCausalLM", describe)
