"""gpt-oss: attention sinks, windows in alternate layers, biases everywhere, experts with a clamped activation."""

from __future__ import annotations

from mindspeed_simpo.model.description import ClampedSwiGLU, Layer, ModelDescription
from mindspeed_simpo.model.mxfp4 import GROUP
from mindspeed_simpo.model.settings import Family, Settings
from mindspeed_simpo.model.tensor_names import TensorNames

_NAMES = TensorNames(router="mlp.router.weight", router_bias="mlp.router.bias")


def describe(settings: Settings) -> ModelDescription:
    """The description of a gpt-oss model; layers differ in windows.

    The softmax over the logits of the chosen experts is the softmax over all, divided by the sum of the chosen.

    Raises:
        ModelError: where the weights are in MXFP4 and a projection has no whole number of groups of inputs.
    """
    hf, raw = settings.hf, settings.raw
    if not (raw.get("rope_scaling") or raw.get("rope_parameters")):
        raise settings.error("rope_scaling is not in the file: write the values of the published file")
    norm = settings.norm(rounds_last=True)
    rotation = settings.rotation(theta=raw.get("rope_theta", 150_000.0))
    activation = ClampedSwiGLU(float(raw.get("swiglu_alpha", 1.702)), float(raw.get("swiglu_limit", 7.0)))
    experts = settings.experts(
        "num_local_experts", "intermediate_size", activation=activation, bias=True, together=True
    )
    mxfp4 = raw.get("quantization_config") is not None
    for key in ("hidden_size", "intermediate_size"):
        if mxfp4 and getattr(hf, key) % GROUP:
            raise settings.error(f"{key} {getattr(hf, key)} is not a multiple of {GROUP}, which weights in MXFP4 need")
    bias = bool(hf.attention_bias)
    windows = settings.windows(settings.layer_types(lambda index: index % 2 == 0))
    layers = [
        Layer(
            norm,
            settings.attention(window, rotation, qkv_bias=bias, o_bias=bias, sinks=True),
            norm,
            None,
            experts=experts,
        )
        for window in windows
    ]
    return settings.model(layers, norm, names=_NAMES, mxfp4=mxfp4)


FAMILY = Family("gpt_oss", "GptOssForCausalLM", describe, quantizations=("mxfp4",))
