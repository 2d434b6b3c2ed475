"""Mistral: the same sliding window in every layer, or no window."""

from __future__ import annotations

from mindspeed_simpo.model.description import Layer, ModelDescription
from mindspeed_simpo.model.settings import Family, Settings


def describe(settings: Settings) -> ModelDescription:
    """The description of a Mistral model; all layers are equal."""
    norm = settings.norm()
    attention = settings.attention(settings.hf.sliding_window, settings.rotation())
    mlp = settings.mlp()
    return settings.model([Layer(norm, attention, norm, mlp) for _ in range(settings.num_layers)], norm)


FAMILY = Family("mistral", "MistralForCausalLM", describe)
