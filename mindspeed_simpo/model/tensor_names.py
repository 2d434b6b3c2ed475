"""Hugging Face names of the modules of a layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorNames:
    """Hugging Face names of a layer's modules; ``qkv`` and ``gate_up`` have one name where fused.

    ``{}`` in the names of experts stands for the number of the expert. Where a layer's experts are stored together, the
    names of their projections are those of checkpoints of training, and ``experts_gate_up`` and ``experts_down`` those
    of the Hugging Face tensors.
    """

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    sinks: str = "self_attn.sinks"
    q: str = "self_attn.q_proj"
    """Projection of the queries where keys and values have a latent vector."""
    q_latent: str = "self_attn.q_a_proj"
    q_latent_norm: str = "self_attn.q_a_layernorm"
    q_from_latent: str = "self_attn.q_b_proj"
    kv_latent: str = "self_attn.kv_a_proj_with_mqa"
    kv_latent_norm: str = "self_attn.kv_a_layernorm"
    kv_from_latent: str = "self_attn.kv_b_proj"
    o: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    router: str = "mlp.gate.weight"
    router_bias: str = "mlp.gate.bias"
    correction: str = "mlp.gate.e_score_correction_bias"
    expert_gate_up: tuple[str, ...] = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj")
    expert_down: str = "mlp.experts.{}.down_proj"
    experts_gate_up: str = "mlp.experts.gate_up_proj"
    experts_down: str = "mlp.experts.down_proj"
    shared_gate_up: tuple[str, ...] = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
    shared_down: str = "mlp.shared_experts.down_proj"
    norm_before_attention: str = "input_layernorm"
    norm_after_attention: str = ""
    norm_before_mlp: str = "post_attention_layernorm"
    norm_after_mlp: str = ""
