"""Gemma 3, text only: five layers with a sliding window and a local rotation per layer without; query-key norms."""

from __future__ import annotations

from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.model.families.gemma2 import check_direction, gemma_model
from mindspeed_simpo.model.settings import Family, Settings


def describe(settings: Settings) -> ModelDescription:
    """The description of a Gemma 3 text model.

    Layers with a window have the unscaled rotation of ``rope_local_base_freq``, the others that of ``rope_theta``.
    """
    check_direction(settings)
    hf, raw, norm = settings.hf, settings.raw, settings.norm(weight_offset=1.0)
    if raw.get("attn_logit_softcapping") is not None:
        raise settings.error("attn_logit_softcapping is set, which transformers ignores: remove it from the file")
    local = settings.rotation(
        layer_type="sliding_attention", theta=raw.get("rope_local_base_freq", 10_000.0), scaled=False
    )
    everywhere = settings.rotation(layer_type="full_attention", theta=raw.get("rope_theta", 1_000_000.0))
    bias = bool(raw.get("attention_bias"))
    period = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6
    windows = settings.windows(settings.layer_types(lambda index: (index + 1) % period != 0))
    attentions = [
        settings.attention(
            window,
            everywhere if window is None else local,
            scale=hf.query_pre_attn_scalar**-0.5,
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=norm,
        )
        for window in windows
    ]
    return gemma_model(settings, norm, attentions)


FAMILY = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    describe,
    refused={
        "gemma3": "gemma3 holds a vision tower too: save its text model (Gemma3ForCausalLM, model_type gemma3_text) "
        "into a folder of its own and use that"
    },
)
