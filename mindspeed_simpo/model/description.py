"""What a decoder is, layer by layer: no tensors, no framework, no name of a family in any condition.

``model/families`` turns a ``config.json`` into a :class:`ModelDescription`; ``model/naming.py`` derives the parameters
from it, ``model/megatron`` the modules, ``training/memory.py`` the bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Activation = Literal["silu", "gelu_tanh"]
RotationKind = Literal["default", "linear", "llama3", "yarn", "dynamic", "longrope"]


@dataclass(frozen=True)
class Norm:
    """RMSNorm ``(weight_offset + weight) * x / sqrt(mean(x^2) + eps)``."""

    eps: float
    weight_offset: float = 0.0
    """1 where the checkpoint stores ``weight - 1``; such a norm multiplies in fp32, before it rounds."""


@dataclass(frozen=True)
class Rotation:
    """Rotary position embedding of the first ``dims`` numbers of each head; ``kind`` is transformers' ``rope_type``."""

    theta: float
    dims: int
    kind: RotationKind = "default"
    interleaved: bool = False
    """Neighbours are rotated into each other, else the two halves."""
    factor: float = 1.0
    attention_factor: float = 1.0
    """Cosines and sines are multiplied by it."""
    original_length: float = 0.0
    """Tokens that the unscaled rotation was trained for; ``max_position_embeddings`` for ``dynamic``."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Whether a sequence's own length changes its frequencies."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class HeadShare:
    """The heads that one tensor-parallel rank computes."""

    first_query: int
    queries: int
    padded_queries: int
    """Rows of the parameters, the same on every rank: where ranks differ, the last heads are padding."""
    first_kv: int
    kv_heads: int
    kv_part: int
    """Which part of the rows of its key-value head this rank holds, where ranks share one."""
    kv_parts: int


@dataclass(frozen=True)
class Attention:
    """Causal grouped-query attention ``softmax(cap(scale q k^T)) v``, ``cap(x) = softcap tanh(x / softcap)``."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rotation: Rotation
    window: int | None = None
    """Keys that a query sees, its own included; None for all before it."""
    softcap: float | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Norm | None = None
    """Over each head of the queries and keys, before the rotation."""

    def share(self, rank: int, size: int) -> HeadShare:
        """Heads of tensor-parallel rank ``rank`` of ``size``; consecutive ranks share a key-value head."""
        group = self.heads // self.kv_heads
        if size <= self.kv_heads:
            kv_heads = self.kv_heads // size
            queries = kv_heads * group
            return HeadShare(rank * queries, queries, queries, rank * kv_heads, kv_heads, 0, 1)
        parts = size // self.kv_heads
        kv_head, part = divmod(rank, parts)
        fewest, longer = divmod(group, parts)
        first = kv_head * group + part * fewest + min(part, longer)
        return HeadShare(first, fewest + (part < longer), fewest + (longer > 0), kv_head, 1, part, parts)


@dataclass(frozen=True)
class MLP:
    """``down(activation(gate x) * up x)``."""

    width: int
    activation: Activation = "silu"
    bias: bool = False


@dataclass(frozen=True)
class Layer:
    """``x += norm_after(attention(norm(x)))``, then the same with the MLP."""

    norm_before_attention: Norm
    attention: Attention
    norm_before_mlp: Norm
    mlp: MLP
    norm_after_attention: Norm | None = None
    norm_after_mlp: Norm | None = None


@dataclass(frozen=True)
class TensorNames:
    """Hugging Face names of a layer's modules; one name where gate and up, or queries, keys and values, are fused."""

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    norm_before_attention: str = "input_layernorm"
    norm_after_attention: str = ""
    norm_before_mlp: str = "post_attention_layernorm"
    norm_after_mlp: str = ""


@dataclass(frozen=True)
class ModelDescription:
    """A decoder, and how its checkpoint names it."""

    family: str
    """``model_type``; for messages."""
    architecture: str
    """The class that transformers gives it."""
    names: TensorNames
    hidden_size: int
    vocab_size: int
    tied: bool
    """Whether the output layer is the embedding."""
    embedding_scale: float
    """Of the embedded tokens; rounded to the compute dtype, as transformers does."""
    final_norm: Norm
    logit_softcap: float | None
    """Logits are ``softcap tanh(logits / softcap)``."""
    max_position_embeddings: int
    initializer_range: float
    """Standard deviation of random weights (``init_from: config``)."""
    dtype: str
    """Declared dtype of the stored weights; an export has it too."""
    layers: tuple[Layer, ...]

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return len(self.layers)

    @property
    def rotations(self) -> tuple[Rotation, ...]:
        """The distinct rotations of the layers, in order."""
        return tuple(dict.fromkeys(layer.attention.rotation for layer in self.layers))

    def shares_prefixes(self, seq_length: int) -> bool:
        """Whether chosen and rejected response may go on from one prompt, in sequences of at most ``seq_length``.

        False where the frequencies depend on the length of the whole sequence: the two then rotate the prompt apart.
        """
        return not any(each.depends_on_length and seq_length > each.original_length for each in self.rotations)

    def padded_vocab_size(self, tensor_parallel_size: int) -> int:
        """Rows of the embedding once every tensor-parallel rank holds equally many."""
        return -(-self.vocab_size // tensor_parallel_size) * tensor_parallel_size

    def difference(self, other: ModelDescription) -> str | None:
        """The first property of shape or arithmetic in which ``other`` differs, for messages; None where none does."""
        kept = ("dtype", "initializer_range", "max_position_embeddings")
        for (name, ours), (_, theirs) in zip(_leaves("", self), _leaves("", other), strict=False):
            if ours != theirs and name not in kept:
                return f"{name} ({theirs}) than the trained model ({ours})"
        return None


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            if field.name == "layers":
                layers = getattr(value, field.name)
                yield "num_hidden_layers", len(layers)
                for index, layer in enumerate(layers):
                    yield from _leaves(f"layers.{index}", layer)
            else:
                yield from _leaves(f"{name}.{field.name}".removeprefix("."), getattr(value, field.name))
    else:
        yield name, value
