"""GLM-4.5 and 4.6: experts chosen by corrected sigmoid scores, beside a shared expert; the first layers are dense."""

from __future__ import annotations

from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.model.settings import Family, Settings


def describe(settings: Settings) -> ModelDescription:
    """The description of a GLM-4.5 model; the layers from ``first_k_dense_replace`` on have experts.

    The layers of multi-token prediction that published checkpoints have after the last layer are not part of it.
    """
    hf, norm = settings.hf, settings.norm()
    attention = settings.attention(
        None,
        settings.rotation(partial=0.5),
        qkv_bias=bool(hf.attention_bias),
        qk_norm=norm if hf.use_qk_norm else None,
    )
    return settings.model(settings.dense_then_experts(attention), norm)


FAMILY = Family("glm4_moe", "Glm4MoeForCausalLM", describe, ignores_layers_beyond=True)
