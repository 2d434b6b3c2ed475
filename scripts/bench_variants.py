"""What :mod:`scripts.bench` measures: sets of our own variants and of other trainers'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variants:
    """A set that is measured together; the other trainers' first one is the base of the ratios."""

    ours: dict[str, dict[str, Any]]
    """Name -> keys of a configuration."""
    peers: dict[str, tuple[str, dict[str, Any]]]
    """Name -> function of the worker, options of the other trainer."""
    frozen_weights: bool = False
    """Whether some variants train adapters, which need fewer operations than the count of useful ones."""


_TRL = {"gradient_checkpointing": False}
_LIGER = {**_TRL, "use_liger_kernel": True}

SETS = {
    "levers": Variants(
        ours={
            "default": {},
            "padded": {"batching": "padded", "fused_logprob": False},
            "padded, fused head": {"batching": "padded"},
            "padded, fused head, two_pass": {"batching": "padded", "pair_schedule": "two_pass"},
            "packed": {"batching": "packed", "fused_logprob": False},
            "packed, fused head": {"batching": "packed"},
            "prefix_shared": {"batching": "prefix_shared", "fused_logprob": False},
        },
        peers={
            "TRL": ("trl", _TRL),
            "TRL, its default checkpointing": ("trl", {"gradient_checkpointing": True}),
            "LLaMA-Factory": ("llamafactory", {"disable_gradient_checkpointing": True}),
        },
    ),
    "adapters": Variants(
        ours={
            "all weights": {},
            "adapters": {"lora_r": 16},
            "adapters of q_proj, v_proj": {"lora_r": 16, "lora_target_modules": ["q_proj", "v_proj"]},
            "DPO, all weights": {"stage": "dpo"},
            "DPO, adapters": {"stage": "dpo", "lora_r": 16},
        },
        peers={
            "TRL, all weights": ("trl", _TRL),
            "TRL with peft": ("trl", {**_TRL, "lora_r": 16}),
        },
        frozen_weights=True,
    ),
    "backends": Variants(
        ours={
            "megatron": {},
            "fsdp": {"backend": "fsdp"},
            "fsdp, padded": {"backend": "fsdp", "batching": "padded"},
            "fsdp, two_pass": {"backend": "fsdp", "batching": "packed", "pair_schedule": "two_pass"},
            "DPO, megatron": {"stage": "dpo"},
            "DPO, fsdp": {"stage": "dpo", "backend": "fsdp"},
        },
        peers={
            "TRL": ("trl", _TRL),
            "TRL with Liger": ("trl", _LIGER),
            "DPO, TRL": ("trl_dpo", _TRL),
            "DPO, TRL, padding-free": ("trl_dpo", {**_TRL, "padding_free": True}),
            "DPO, TRL with Liger": ("trl_dpo", _LIGER),
        },
    ),
}
"""The default of ``levers`` is prefix_shared with the fused head, and that of the others the same."""
