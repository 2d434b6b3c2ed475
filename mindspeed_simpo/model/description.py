"""The description of a decoder, layer by layer: sizes and variants, independent of model family and framework.

``model/families`` turns a ``config.json`` into a :class:`ModelDescription`. From the description, ``model/naming.py``
derives the parameters, ``model/megatron`` the modules and ``training/memory.py`` the memory estimate.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mindspeed_simpo.model.tensor_names import TensorNames

Activation = Literal["silu", "gelu_tanh"]
RotationKind = Literal["default", "linear", "llama3", "yarn", "dynamic", "longrope"]


@dataclass(frozen=True)
class Norm:
    """RMSNorm ``(weight_offset + weight) * x / sqrt(mean(x^2) + eps)``."""

    eps: float
    weight_offset: float = 0.0
    """1 where the checkpoint stores ``weight - 1``; such a norm multiplies by the weight in fp32, before rounding."""
    rounds_last: bool = False
    """Whether the product with the weight is computed in fp32 without a ``weight_offset`` too."""


@dataclass(frozen=True)
class Rotation:
    """Rotary position embedding of the first ``dims`` elements of each head; ``kind`` is transformers' ``rope_type``.

    The fields from ``factor`` on parametrise the kinds; :func:`mindspeed_simpo.model.rotary.inverse_frequencies` has
    their formulas.
    """

    theta: float
    dims: int
    kind: RotationKind = "default"
    interleaved: bool = False
    """Pairs are elements ``2i, 2i + 1`` where true, else elements ``i, i + dims / 2``."""
    factor: float = 1.0
    attention_factor: float = 1.0
    """Factor of cosines and sines."""
    original_length: float = 0.0
    """Context length of the original training, tokens; ``max_position_embeddings`` for ``dynamic``."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies depend on the length of the sequence."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class HeadShare:
    """The attention heads of one tensor-parallel rank."""

    first_query: int
    queries: int
    padded_queries: int
    """Query heads in the parameters, the same number on every rank: ``queries`` heads, then padding."""
    first_kv: int
    kv_heads: int
    kv_part: int
    """Index of this rank's part of a key-value head that ``kv_parts`` ranks share."""
    kv_parts: int


@dataclass(frozen=True)
class Latent:
    """Queries, keys and values by way of latent vectors, as in multi-head latent attention.

    With the norms N of the latent vectors ``c_q = N(A_q x)`` and ``c = N(A x)``, the queries are ``B_q c_q``, the keys
    of a head are ``[r, B_k c]`` and its values ``B_v c``. All heads share the rotated part r of the keys, a projection
    of ``x``. The first ``rotation.dims`` elements of queries and keys are rotated.

    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.
    """

    query_rank: int | None
    """Elements of ``c_q``; None where the queries are a projection of ``x``."""
    kv_rank: int
    """Elements of ``c``."""
    value_dim: int
    """Elements of the value of a head."""
    norm: Norm
    bias: bool = False
    """Whether the projections ``A_q`` and ``A`` have biases."""


@dataclass(frozen=True)
class Attention:
    """Causal grouped-query attention ``softmax(cap(scale q k^T)) v``, ``cap(x) = softcap tanh(x / softcap)``.

    With ``sinks`` the denominator of the softmax has ``exp(sink)`` as one more term, with a learned sink of each query
    head.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rotation: Rotation
    window: int | None = None
    """Number of keys that a query attends to, its own included; None for all earlier ones."""
    softcap: float | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Norm | None = None
    """Norm of each head of the queries and keys, before the rotation; None for none."""
    sinks: bool = False
    latent: Latent | None = None
    """Projections by way of latent vectors; None for projections of the hidden states."""

    @property
    def value_dim(self) -> int:
        """Elements of the value of a head; queries and keys have ``head_dim``."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    def share(self, rank: int, size: int) -> HeadShare:
        """Heads of tensor-parallel rank ``rank`` of ``size``.

        With more ranks than key-value heads, consecutive ranks share a key-value head.
        """
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
class ClampedSwiGLU:
    """``(u + 1) g sigmoid(alpha g)``, ``g = min(gate, limit)`` and ``u = min(max(up, -limit), limit)``."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class Experts:
    """``sum_e w_e expert_e(x)`` over the ``top_k`` experts of the token ``x`` with the highest scores.

    An expert is an MLP. The scores are ``scores(router x)``, in fp32, and the weights ``w_e`` are the scores of the
    chosen experts, divided by their sum where ``normalised``, times ``scale``. With several ``groups`` of consecutive
    experts, a token chooses among the experts of the ``top_groups`` groups with the highest sums of their two highest
    scores.
    """

    number: int
    width: int
    """Elements of the inner activation of one expert."""
    top_k: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    scale: float = 1.0
    corrected: bool = False
    """Whether a frozen bias of each expert is added to its score for the choice, and not to the weight."""
    groups: int = 1
    top_groups: int = 1
    activation: Literal["silu"] | ClampedSwiGLU = "silu"
    bias: bool = False
    """Whether the projections of the experts and the router have biases, all of them trained."""
    together: bool = False
    """Whether the checkpoint has one tensor of each projection of all experts of a layer, see
    :class:`~mindspeed_simpo.model.slots.Place`."""


@dataclass(frozen=True)
class Layer:
    """``x += norm_after(attention(norm_before(x)))``, then the same with the MLP; a norm that is None is left out.

    Where a layer has experts, their sum is added to the output of the MLP, which is then the shared expert, or None.
    """

    norm_before_attention: Norm
    attention: Attention
    norm_before_mlp: Norm
    mlp: MLP | None
    norm_after_attention: Norm | None = None
    norm_after_mlp: Norm | None = None
    experts: Experts | None = None


@dataclass(frozen=True)
class ModelDescription:
    """A decoder and the names in its Hugging Face checkpoint."""

    family: str
    """``model_type`` of config.json, for messages."""
    architecture: str
    """Class of transformers, as in ``architectures`` of config.json."""
    names: TensorNames
    hidden_size: int
    vocab_size: int
    tied: bool
    """Whether output layer and embedding share one weight."""
    embedding_scale: float
    """Factor of the embedded tokens, rounded to the compute dtype as in transformers."""
    final_norm: Norm
    logit_softcap: float | None
    """Logits become ``softcap tanh(logits / softcap)``; None for no cap."""
    max_position_embeddings: int
    initializer_range: float
    """Standard deviation of random weights (``init_from: config``)."""
    dtype: str
    """Declared dtype of the stored weights and of an export."""
    layers: tuple[Layer, ...]
    ignores_layers_beyond: bool = False
    """Whether checkpoints may hold layers after the last one, which are not part of the model."""
    mxfp4: bool = False
    """Whether the checkpoint has the weights of the experts in MXFP4 (:mod:`mindspeed_simpo.model.mxfp4`)."""

    def __post_init__(self) -> None:
        # equal layers are one object: what is looked up by layer then compares no fields
        of_each = {layer: layer for layer in reversed(self.layers)}
        object.__setattr__(self, "layers", tuple(of_each[layer] for layer in self.layers))

    def __hash__(self) -> int:
        return hash((self.family, self.hidden_size, self.vocab_size, len(self.layers)))

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return len(self.layers)

    @functools.cached_property
    def first_of_kind(self) -> dict[Layer, int]:
        """Index of the first of each set of equal layers."""
        return {layer: index for index, layer in reversed(list(enumerate(self.layers)))}

    @property
    def takes_images(self) -> bool:
        """Never: the families that are described here take text."""
        return False

    @property
    def has_experts(self) -> bool:
        """Whether a layer has experts."""
        return any(layer.experts is not None for layer in self.layers)

    @property
    def rotations(self) -> tuple[Rotation, ...]:
        """The distinct rotations, in the order of the layers."""
        return tuple(dict.fromkeys(layer.attention.rotation for layer in self.layers))

    def shares_prefixes(self, seq_length: int) -> bool:
        """Whether chosen and rejected may share one copy of their prompt, in sequences of ``seq_length`` tokens.

        False where the rotary frequencies depend on the length of the whole sequence: prompt tokens of the chosen and
        of the rejected sequence then have different rotations.
        """
        return not any(each.depends_on_length and seq_length > each.original_length for each in self.rotations)

    def padded_vocab_size(self, tensor_parallel_size: int) -> int:
        """``vocab_size`` rounded up to a multiple of ``tensor_parallel_size``: rows of the embedding over all ranks."""
        return -(-self.vocab_size // tensor_parallel_size) * tensor_parallel_size

    def sharded_axes(self, tensor_ranks: int) -> Iterator[tuple[str, int]]:
        """Name and elements of each axis of the sharded projections, but experts, on one of ``tensor_ranks`` ranks."""
        yield "hidden_size", self.hidden_size
        for layer in self.layers:
            attention, share = layer.attention, layer.attention.share(0, tensor_ranks)
            queries = share.padded_queries * attention.head_dim
            yield "output of the attention", share.padded_queries * attention.value_dim
            if attention.latent is None:
                keys = share.kv_heads * attention.head_dim // share.kv_parts
                yield "queries, keys and values", queries + 2 * keys
            else:
                unrotated = attention.head_dim - attention.rotation.dims
                yield "queries", queries
                yield "keys and values", share.padded_queries * (unrotated + attention.value_dim)
                yield "kv_lora_rank", attention.latent.kv_rank
                yield "q_lora_rank", attention.latent.query_rank or self.hidden_size
            if layer.mlp is not None:
                yield "intermediate_size", layer.mlp.width // tensor_ranks
                yield "gate and up projection", 2 * layer.mlp.width // tensor_ranks

    def difference(self, other: ModelDescription) -> str | None:
        """The first field of shape or arithmetic in which ``other`` differs, for messages; None where equal."""
        ignored = ("dtype", "mxfp4", "initializer_range", "max_position_embeddings")
        for (name, ours), (_, theirs) in zip(_leaves("", self), _leaves("", other), strict=False):
            if ours != theirs and name not in ignored:
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
