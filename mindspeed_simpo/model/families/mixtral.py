"""Mixtral: attention of Mistral, experts in place of the MLP."""

from __future__ import annotations

from mindspeed_simpo.model.description import Layer, ModelDescription
from mindspeed_simpo.model.settings import Family, Settings
from mindspeed_simpo.model.tensor_names import TensorNames

_NAMES = TensorNames(
    router="block_sparse_moe.gate.weight",
    expert_gate_up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
    expert_down="block_sparse_moe.experts.{}.w2",
)


def describe(settings: Settings) -> ModelDescription:
    """The description of a Mixtral model; all layers are equal.

    Raises:
        ModelError: where ``router_jitter_noise`` is set, which makes the router random.
    """
    if settings.raw.get("router_jitter_noise"):
        raise settings.error("router_jitter_noise is not supported: set it to 0.0")
    norm = settings.norm()
    attention = settings.attention(settings.hf.sliding_window, settings.rotation())
    experts = settings.experts("num_local_experts", "intermediate_size")
    layers = [Layer(norm, attention, norm, None, experts=experts) for _ in range(settings.num_layers)]
    return settings.model(layers, norm, names=_NAMES)


FAMILY = Family("mixtral", "MixtralForCausalLM", describe)
