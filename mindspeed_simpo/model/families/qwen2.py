"""Qwen 1.5, 2 and 2.5: bias of queries, keys and values; windows in the last layers under ``use_sliding_window``."""

from __future__ import annotations

from mindspeed_simpo.model.description import Layer, ModelDescription
from mindspeed_simpo.model.settings import Family, Settings


def windows(settings: Settings) -> list[int | None]:
    """The window of each layer: by ``layer_types``, else in the layers from ``max_window_layers`` on."""
    used = bool(settings.raw.get("use_sliding_window"))
    return settings.windows(settings.layer_types(lambda index: used and index >= settings.hf.max_window_layers))


def describe(settings: Settings) -> ModelDescription:
    """The description of a Qwen 2 model; layers differ in their windows."""
    norm, rotation, mlp = settings.norm(), settings.rotation(), settings.mlp()
    layers = [
        Layer(norm, settings.attention(window, rotation, qkv_bias=True), norm, mlp) for window in windows(settings)
    ]
    return settings.model(layers, norm)


FAMILY = Family("qwen2", "Qwen2ForCausalLM", describe)
