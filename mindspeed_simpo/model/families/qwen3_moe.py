"""Qwen 3 with experts (Qwen3-30B-A3B, Qwen3-235B-A22B): attention of Qwen 3, experts in place of the MLP."""

from __future__ import annotations

from mindspeed_simpo.model.description import Layer, ModelDescription
from mindspeed_simpo.model.settings import Family, Settings


def describe(settings: Settings) -> ModelDescription:
    """The description of a Qwen 3 model with experts.

    Every ``decoder_sparse_step``-th layer has experts, apart from those in ``mlp_only_layers``; the others have an MLP.
    """
    hf, norm, rotation, mlp = settings.hf, settings.norm(), settings.rotation(), settings.mlp()
    number = "num_experts" if hasattr(settings.hf, "num_experts") else "num_local_experts"
    experts = settings.experts(number, "moe_intermediate_size", normalised=bool(hf.norm_topk_prob))
    bias = bool(settings.raw.get("attention_bias"))
    window = hf.sliding_window if settings.raw.get("use_sliding_window") else None
    attention = settings.attention(window, rotation, qkv_bias=bias, o_bias=bias, qk_norm=norm)
    dense, step = set(settings.raw.get("mlp_only_layers") or ()), settings.raw.get("decoder_sparse_step") or 1
    layers = [
        Layer(norm, attention, norm, mlp)
        if index in dense or (index + 1) % step
        else Layer(norm, attention, norm, None, experts=experts)
        for index in range(settings.num_layers)
    ]
    return settings.model(layers, norm)


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", describe)
