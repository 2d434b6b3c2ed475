"""The settings of a ``config.json`` in the words of a description; what every family's file reads with.

Rotary settings and layer types are read from the file itself: transformers 4 and 5 write and hold them differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.description import (
    MLP,
    Attention,
    Layer,
    ModelDescription,
    Norm,
    Rotation,
    RotationKind,
    TensorNames,
)

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
)
_NUMBERS: dict[RotationKind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "dynamic": ("factor",),
    "longrope": ("original_max_position_embeddings",),
}
"""Numbers that each kind of rotary scaling needs."""
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Family:
    """One supported ``model_type``; each file of ``model/families`` has one as ``FAMILY``."""

    model_type: str
    architecture: str
    describe: Callable[[Settings], ModelDescription]
    refused: Mapping[str, str] = field(default_factory=dict)
    """Other values of ``model_type`` that are near to it -> what to do in their place."""
    rotary_aliases: Mapping[str, RotationKind] = field(default_factory=dict)
    """Names that its old files have for kinds of rotary scaling."""


class Settings:
    """A ``config.json``, and what transformers makes of it."""

    hf: Any
    """transformers' configuration object, with the defaults that the file leaves out."""

    def __init__(self, path: Path, raw: dict[str, Any], family: Family) -> None:
        self.path = path
        self.raw = raw
        self.family = family

    def error(self, message: str) -> ModelError:
        """What to raise: it names the file."""
        return ModelError(f"{self.path}: {message}")

    def check_numbers(self) -> None:
        """Refuse sizes that are no sizes and a dtype that is unknown, before transformers meets them."""
        for name in _SIZES:
            value = self.raw.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise self.error(f"{name} is {value!r}; expected a whole number of at least 1")
        for scaling in [*self._rotary_objects(), self.raw]:
            kind = self._rotation_kind(scaling)
            for key in ("rope_theta", "partial_rotary_factor", *_NUMBERS[kind]):
                if scaling.get(key) is not None:
                    self._positive(key, scaling[key])
        _ = self.dtype

    @property
    def dtype(self) -> str:
        """Declared dtype of the stored weights."""
        dtype = self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32"
        if dtype not in STORED_DTYPES:
            raise self.error(f"dtype {dtype!r} is not supported; supported: {', '.join(STORED_DTYPES)}")
        return str(dtype)

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        return int(getattr(self.hf, "head_dim", None) or self.hf.hidden_size // self.hf.num_attention_heads)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return int(self.hf.num_hidden_layers)

    def norm(self, weight_offset: float = 0.0) -> Norm:
        """RMSNorm of the model's ``rms_norm_eps``."""
        return Norm(float(self.hf.rms_norm_eps), weight_offset)

    def layer_types(self, pattern: Callable[[int], bool]) -> list[bool]:
        """Whether each layer has a window.

        Args:
            pattern: Says so of a layer's index, where the file has no ``layer_types``.

        Raises:
            ModelError: for another attention than ``full_attention`` and ``sliding_attention``.
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
        """The window of each layer.

        Raises:
            ModelError: where a layer has one whose length is not given.
        """
        window = getattr(self.hf, "sliding_window", None)
        if any(is_sliding) and window is None:
            raise self.error("layer_types names sliding_attention, but sliding_window is not set")
        return [window if sliding else None for sliding in is_sliding]

    def attention(
        self, window: int | None, rotation: Rotation, *, scale: float | None = None, **variants: Any
    ) -> Attention:
        """The model's heads with one layer's window and rotation.

        Args:
            window: See :class:`Attention`.
            rotation: See :class:`Attention`.
            scale: Of the scores; ``head_dim ** -0.5`` by default.
            variants: Other fields of :class:`Attention`.

        Raises:
            ModelError: where the heads do not share keys evenly.
        """
        heads: int = self.hf.num_attention_heads
        kv_heads = heads if self.hf.num_key_value_heads is None else self.hf.num_key_value_heads
        if heads % kv_heads:
            raise self.error(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        scale = self.head_dim**-0.5 if scale is None else scale
        return Attention(heads, kv_heads, self.head_dim, scale, rotation, window, **variants)

    def mlp(self, *, bias: bool = False, key: str = "hidden_act", expected: str = "silu") -> MLP:
        """The model's MLP.

        Args:
            bias: See :class:`MLP`.
            key: Which setting names the activation.
            expected: Which one this family has.

        Raises:
            ModelError: for another activation.
        """
        found = getattr(self.hf, key)
        activation = _ACTIVATIONS.get(found)
        if activation is None or activation != _ACTIVATIONS[expected]:
            raise self.error(f"{key} {found!r} is not supported; expected {expected!r}")
        return MLP(self.hf.intermediate_size, activation, bias)  # type: ignore[arg-type]

    def model(self, layers: Sequence[Layer], final_norm: Norm, **variants: Any) -> ModelDescription:
        """The description; ``variants`` are fields of it that most families leave alone."""
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
            layers=tuple(layers),
            **(defaults | variants),
        )

    def rotation(
        self,
        *,
        layer_type: str | None = None,
        theta: float | None = None,
        partial: float = 1.0,
        interleaved: bool = False,
        scaled: bool = True,
    ) -> Rotation:
        """Rotary embedding of the whole model, or of the layers of one type.

        Args:
            layer_type: Whose settings are meant, where the file has them by type.
            theta: Where the file gives none.
            partial: Rotated part of a head, where the file gives none.
            interleaved: See :class:`Rotation`.
            scaled: False where ``rope_scaling`` is not meant for these layers.

        Raises:
            ModelError: for an unknown kind, and for numbers that are missing or no numbers.
        """
        scaling = self._scaling(layer_type, scaled=scaled)
        kind = self._rotation_kind(scaling)
        theta = scaling.get("rope_theta", theta if theta is not None else self.raw.get("rope_theta", 10000.0))
        given = {"rope_theta": theta, "partial_rotary_factor": self._partial(scaling, partial)}
        outer = self.raw.get("original_max_position_embeddings")
        scaling = {"original_max_position_embeddings": outer or self.hf.max_position_embeddings} | scaling
        if outer:  # transformers prefers the outer one
            scaling["original_max_position_embeddings"] = outer
        given |= {key: scaling.get(key) for key in _NUMBERS[kind]}
        numbers = {key: self._positive(key, value) for key, value in given.items()}
        dims = int(self.head_dim * numbers["partial_rotary_factor"])
        if dims % 2 or not 0 < dims <= self.head_dim:
            raise self.error(
                f"head_dim {self.head_dim} x partial_rotary_factor {numbers['partial_rotary_factor']:g} gives {dims} "
                "rotated numbers; rotary embeddings need an even number of them, at most head_dim"
            )
        variants = self._variants(kind, scaling, numbers, dims)
        return Rotation(numbers["rope_theta"], dims, kind, interleaved, **variants)

    def _rotary_objects(self) -> list[dict[str, Any]]:
        scaling = self.raw.get("rope_scaling") or self.raw.get("rope_parameters") or {}
        if not isinstance(scaling, dict):
            raise self.error(f"rope_scaling or rope_parameters is not an object: {scaling!r}")
        nested = [each for each in scaling.values() if isinstance(each, dict)]
        return nested or [scaling]

    def _scaling(self, layer_type: str | None, *, scaled: bool) -> dict[str, Any]:
        # transformers 5 writes one rope_parameters object, by layer type where types differ; 4 wrote rope_theta and,
        # where scaled, rope_scaling beside it.
        parameters = self.raw.get("rope_parameters") or {}
        nested = any(isinstance(each, dict) for each in parameters.values())
        own = (parameters.get(layer_type) or {}) if nested and layer_type is not None else parameters
        scaling = self.raw.get("rope_scaling") or {} if scaled else {}
        return {**own, **scaling}

    def _rotation_kind(self, scaling: dict[str, Any]) -> RotationKind:
        kind = str(scaling.get("rope_type", scaling.get("type", "default")))
        kind = self.family.rotary_aliases.get(kind, kind)
        if kind not in _NUMBERS:
            raise self.error(f"rotary scaling {kind!r} is not supported; supported: {', '.join(_NUMBERS)}")
        return kind

    def _partial(self, scaling: dict[str, Any], default: float) -> Any:
        found = scaling.get("partial_rotary_factor", self.raw.get("partial_rotary_factor"))
        return default if found is None else found

    def _positive(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise self.error(f"{key} of the rotary embedding is {value!r}; expected a positive number")
        return float(value)

    def _variants(
        self, kind: RotationKind, scaling: dict[str, Any], numbers: dict[str, float], dims: int
    ) -> dict[str, Any]:
        variants: dict[str, Any] = {}
        if "factor" in numbers:
            variants["factor"] = numbers["factor"]
        if "original_max_position_embeddings" in numbers:
            variants["original_length"] = numbers["original_max_position_embeddings"]
        if kind == "llama3":
            variants |= {key: numbers[key] for key in ("low_freq_factor", "high_freq_factor")}
        if kind == "dynamic":
            variants["original_length"] = float(self.hf.max_position_embeddings)
        if kind == "yarn":
            variants |= {
                "beta_fast": self._positive("beta_fast", scaling.get("beta_fast") or 32.0),
                "beta_slow": self._positive("beta_slow", scaling.get("beta_slow") or 1.0),
                "truncate": bool(scaling.get("truncate", True)),
                "attention_factor": self._yarn_attention(scaling, numbers["factor"]),
            }
        if kind == "longrope":
            variants |= self._longrope(scaling, numbers["original_max_position_embeddings"], dims // 2)
        return variants

    def _yarn_attention(self, scaling: dict[str, Any], factor: float) -> float:
        if scaling.get("attention_factor") is not None:
            return self._positive("attention_factor", scaling["attention_factor"])

        def magnitude(mscale: float) -> float:
            return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            whole, every = (self._positive(key, scaling[key]) for key in ("mscale", "mscale_all_dim"))
            return magnitude(whole) / magnitude(every)
        return magnitude(1.0)

    def _longrope(self, scaling: dict[str, Any], original: float, number: int) -> dict[str, Any]:
        factors = {}
        for key in ("short_factor", "long_factor"):
            given = scaling.get(key)
            if not isinstance(given, list) or len(given) != number:
                raise self.error(f"{key} of the rotary embedding is {given!r}; expected a list of {number} numbers")
            factors[f"{key}s"] = tuple(self._positive(key, each) for each in given)
        factor = scaling.get("factor") or self.hf.max_position_embeddings / original
        attention = scaling.get("attention_factor")
        if attention is None:
            attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return {**factors, "attention_factor": self._positive("attention_factor", attention)}
