"""The options of the model and of adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from mindspeed_simpo.config.options.base import Options, option

ALL_LINEAR = "all-linear"
"""Value of ``lora_target_modules`` for every projection."""


class ModelOptions(Options):
    """Model."""

    model_name_or_path: str = option(
        effect="result", description="Hugging Face model to train, with its tokenizer: a local folder or a hub id."
    )
    init_from: Literal["weights", "config"] = option(
        "weights",
        effect="result",
        description="Initial weights: those of the model, or random ones in the shape that its config.json gives.",
    )
    chat_template: str | None = option(
        None,
        effect="result",
        description="Jinja file of a chat template that replaces the tokenizer's own.",
    )


class AdapterOptions(Options):
    """Adapters (LoRA)."""

    lora_r: int = option(
        0,
        ge=0,
        effect="result",
        description="Rank of the adapters (LoRA) of the projections; with a rank, only the adapters are trained, and "
        "the model's own weights are frozen. 0 trains all weights, without adapters.",
    )
    lora_alpha: float | None = option(
        None,
        gt=0,
        effect="result",
        description="Scale of the adapters: their product is multiplied by lora_alpha / lora_r. Default: 2 x lora_r.",
    )
    lora_dropout: float = option(
        0.0,
        ge=0,
        lt=1,
        effect="result",
        description="Dropout of the adapters' inputs in training. The masks follow from seed, step, pair and token: "
        "every layout and form of batches has the same.",
    )
    lora_target_modules: str | list[str] = option(
        "all-linear",
        effect="result",
        description="Projections that have adapters, by their Hugging Face names as in peft, such as q_proj v_proj; "
        "all-linear for every projection of every layer.",
    )
    lora_load: str | None = option(
        None,
        effect="result",
        description="Adapters to start from: a folder that peft or `export` wrote, of the same rank and modules. "
        "Default: new adapters, whose product is zero.",
    )

    quantization: Literal["nf4"] | None = option(
        None,
        effect="result",
        description="With backend: fsdp and adapters, hold the frozen weights of linear layers in 4 bits: nf4, by "
        "bitsandbytes (QLoRA). Default: as stored.",
    )

    @field_validator("lora_target_modules")
    @classmethod
    def _modules_are_given(cls, value: str | list[str]) -> str | list[str]:
        if not all([value] if isinstance(value, str) else value or [""]):
            raise ValueError("expected all-linear, or a list of at least one name, such as q_proj")
        return value

    @model_validator(mode="after")
    def _adapters_agree(self) -> AdapterOptions:
        without_rank = [
            name
            for name, field in AdapterOptions.model_fields.items()
            if name != "lora_r" and getattr(self, name) != field.default
        ]
        if not self.lora_r and without_rank:
            raise ValueError(
                f"{', '.join(without_rank)}: there are no adapters without a rank: set lora_r, such as 16, or remove "
                f"{'it' if len(without_rank) == 1 else 'them'}"
            )
        return self

    @property
    def lora_alpha_in_use(self) -> float:
        """``lora_alpha`` with its default."""
        return 2.0 * self.lora_r if self.lora_alpha is None else self.lora_alpha
