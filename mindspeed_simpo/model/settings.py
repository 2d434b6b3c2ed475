"""Reading of a ``config.json`` into the parts of a description, for the modules of ``model/families``.

Layer types are read from the file itself, because transformers 4 and 5 store them differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_simpo.model.description import (
    MLP,
    Attention,
    Experts,
    Layer,
    ModelDescription,
    Norm,
    Rotation,
    RotationKind,
)
from mindspeed_simpo.model.rotary_settings import RotarySettings
from mindspeed_simpo.model.tensor_names import TensorNames

STORED_DTYPES = ("float32", "bfloat16", "float16", "float64")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Family:
    """One supported ``model_type``; each module of ``model/families`` defines one as ``FAMILY``."""

    model_type: str
    architecture: str
    describe: Callable[[Settings], ModelDescription]
    refused: Mapping[str, str] = field(default_factory=dict)
    """Related but unsupported values of ``model_type`` -> advice for the error message."""
    rotary_aliases: Mapping[str, RotationKind] = field(default_factory=dict)
    """Names in old files -> kinds of rotary scaling."""
    ignores_layers_beyond: bool = False
    """Whether published checkpoints have layers after the last one, for another purpose, which are not read."""
    quantizations: tuple[str, ...] = ()
    """Values of ``quant_method`` whose weights are read, dequantized."""


class Settings(RotarySettings):
    """A ``config.json``, with methods that return the parts of a description."""

    def __init__(self, path: Path, raw: dict[str, Any], family: Family) -> None:
        super().__init__(path, raw, family.rotary_aliases)
        self.family = family

    def check_numbers(self) -> None:
        """Check sizes, rotary numbers and dtype, before transformers reads the file.

        Errors of transformers name neither file nor key.

        Raises:
            ModelError: for a size that is not a positive whole number, for rotary numbers that are not positive, and
                for an unknown dtype.
        """
        for name in _SIZES:
            value = self.raw.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise self.error(f"{name} is {value!r}; expected a whole number of at least 1")
        self.check_rotary_numbers()
        _ = self.dtype

    @property
    def dtype(self) -> str:
        """Declared dtype of the stored weights."""
        dtype = self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32"
        if dtype not in STORED_DTYPES:
            raise self.error(f"dtype {dtype!r} is not supported; supported: {', '.join(STORED_DTYPES)}")
        return str(dtype)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return int(self.hf.num_hidden_layers)

    def norm(self, **variants: Any) -> Norm:
        """RMSNorm with the ``rms_norm_eps`` of the file; ``variants`` are other fields of :class:`Norm`."""
        return Norm(float(self.hf.rms_norm_eps), **variants)

    def layer_types(self, pattern: Callable[[int], bool]) -> list[bool]:
        """Whether each layer has a sliding window, by ``layer_types`` of the file or else by ``pattern``.

        Args:
            pattern: Index of a layer -> whether the layer has a sliding window.

        Raises:
            ModelError: for layer types other than ``full_attention`` and ``sliding_attention``, and where their number
                is not that of the layers.
        """
        types = self.raw.get("layer_types")
        if types is None:
            return [pattern(index) for index in range(self.num_layers)]
        if unknown := sorted({str(each) for each in types} - {"full_attention", "sliding_attention"}):
            raise self.error(f"layer_types {unknown} are not supported; expected full_attention or sliding_attention")
        if len(types) != self.num_layers:
            raise self.error(f"layer_types has {len(types)} entries; expected num_hidden_layers {self.num_layers}")
        return [each == "sliding_attention" for each in types]

    def windows(self, is_sliding: Sequence[bool]) -> list[int | None]:
        """Sliding window of each layer in tokens, None for layers without one.

        Raises:
            ModelError: where a layer has a window and the file no ``sliding_window``.
        """
        window = getattr(self.hf, "sliding_window", None)
        if any(is_sliding) and window is None:
            raise self.error("layer_types names sliding_attention, but sliding_window is not set")
        return [window if sliding else None for sliding in is_sliding]

    def attention(
        self, window: int | None, rotation: Rotation, *, scale: float | None = None, **variants: Any
    ) -> Attention:
        """Attention of a layer, with the heads of the file.

        Args:
            window: See :class:`Attention`.
            rotation: See :class:`Attention`.
            scale: Factor of the scores; ``head_dim ** -0.5`` by default.
            variants: Other fields of :class:`Attention`.

        Raises:
            ModelError: where ``num_attention_heads`` is not a multiple of ``num_key_value_heads``.
        """
        heads: int = self.hf.num_attention_heads
        kv_heads = heads if self.hf.num_key_value_heads is None else self.hf.num_key_value_heads
        if heads % kv_heads:
            raise self.error(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        scale = self.head_dim**-0.5 if scale is None else scale
        return Attention(heads, kv_heads, self.head_dim, scale, rotation, window, **variants)

    def mlp(self, *, bias: bool = False, key: str = "hidden_act", expected: str = "silu") -> MLP:
        """MLP of a layer, with the ``intermediate_size`` of the file.

        Args:
            bias: See :class:`MLP`.
            key: Key of the activation in the file.
            expected: Activation of the family.

        Raises:
            ModelError: where the file has another activation.
        """
        found = getattr(self.hf, key)
        activation = _ACTIVATIONS.get(found)
        if activation is None or activation != _ACTIVATIONS[expected]:
            raise self.error(f"{key} {found!r} is not supported; expected {expected!r}")
        return MLP(self.hf.intermediate_size, activation, bias)  # type: ignore[arg-type]

    def experts(self, number: str, width: str, **variants: Any) -> Experts:
        """Experts of a layer, with the ``num_experts_per_tok`` of the file.

        Args:
            number: Key of the number of experts.
            width: Key of the size of an expert.
            variants: Other fields of :class:`Experts`.

        Raises:
            ModelError: where the file has more experts for a token than experts, or another activation than ``silu``.
        """
        found = getattr(self.hf, "hidden_act", "silu")
        if _ACTIVATIONS.get(found) != "silu":
            raise self.error(f"hidden_act {found!r} is not supported with experts; expected 'silu'")
        experts, top_k = int(getattr(self.hf, number)), int(self.hf.num_experts_per_tok)
        if top_k > experts:
            raise self.error(f"num_experts_per_tok {top_k} is more than {number} {experts}")
        return Experts(experts, int(getattr(self.hf, width)), top_k, **variants)

    def dense_then_experts(self, attention: Attention) -> list[Layer]:
        """The layers: ``first_k_dense_replace`` with an MLP, then those with corrected experts and a shared expert.

        The ``n_shared_experts`` shared experts are computed as one MLP.

        Args:
            attention: Attention of every layer.

        Raises:
            ModelError: see :meth:`corrected_experts`.
        """
        norm, mlp, experts = self.norm(), self.mlp(), self.corrected_experts()
        shared = MLP(self.hf.n_shared_experts * self.hf.moe_intermediate_size)
        dense, mixed = Layer(norm, attention, norm, mlp), Layer(norm, attention, norm, shared, experts=experts)
        return [dense if index < self.hf.first_k_dense_replace else mixed for index in range(self.num_layers)]

    def corrected_experts(self) -> Experts:
        """Experts chosen by corrected sigmoid scores within the best ``topk_group`` of ``n_group`` groups.

        Raises:
            ModelError: where the experts do not divide into groups of at least two, or the groups of a token have fewer
                experts than the token chooses.
        """
        hf = self.hf
        experts = self.experts(
            "n_routed_experts",
            "moe_intermediate_size",
            scores="sigmoid",
            normalised=bool(hf.norm_topk_prob),
            scale=float(hf.routed_scaling_factor),
            corrected=True,
            groups=int(hf.n_group or 1),
            top_groups=int(hf.topk_group or 1),
        )
        number, groups, top_groups = experts.number, experts.groups, experts.top_groups
        if groups > 1 and (number % groups or number // groups < 2):
            raise self.error(f"n_group {groups} does not divide n_routed_experts {number} into groups of at least two")
        if top_groups > groups or number // groups * top_groups < experts.top_k:
            raise self.error(
                f"topk_group {top_groups} of n_group {groups} leaves {number // groups * top_groups} of "
                f"{number} experts, of which num_experts_per_tok {experts.top_k} cannot be chosen"
            )
        return experts

    def model(self, layers: Sequence[Layer], final_norm: Norm, **variants: Any) -> ModelDescription:
        """The description of the model; ``variants`` override fields that most families leave at their defaults."""
        defaults: dict[str, Any] = {"names": TensorNames(), "embedding_scale": 1.0, "logit_softcap": None}
        return ModelDescription(
            family=self.family.model_type,
            architecture=self.family.architecture,
            hidden_size=self.hf.hidden_size,
            vocab_size=self.hf.vocab_size,
            tied=bool(self.hf.tie_word_embeddings),
            final_norm=final_norm,
            max_position_embeddings=self.hf.max_position_embeddings,
            initializer_range=float(self.hf.initializer_range),
            dtype=self.dtype,
            ignores_layers_beyond=self.family.ignores_layers_beyond,
            layers=tuple(layers),
            **(defaults | variants),
        )
