"""Reading of the rotary settings of a ``config.json`` into a ``Rotation``.

The settings are read from the file itself, because transformers 4 and 5 store them differently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.description import Rotation, RotationKind

_NUMBERS: dict[RotationKind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "dynamic": ("factor",),
    "longrope": ("original_max_position_embeddings",),
}
"""Numbers that each kind of rotary scaling requires."""


class RotarySettings:
    """A ``config.json`` and its rotary settings.

    Args:
        path: The file, for messages.
        raw: Content of the file.
        aliases: Names in old files -> kinds of rotary scaling.
    """

    hf: Any
    """Configuration object of transformers, with defaults for what the file leaves out."""

    def __init__(self, path: Path, raw: dict[str, Any], aliases: Mapping[str, RotationKind]) -> None:
        self.path = path
        self.raw = raw
        self._aliases = aliases

    def error(self, message: str) -> ModelError:
        """A ``ModelError`` whose message begins with the path of the file."""
        return ModelError(f"{self.path}: {message}")

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return int(getattr(self.hf, "head_dim", None) or self.hf.hidden_size // self.hf.num_attention_heads)

    def check_rotary_numbers(self) -> None:
        """Check the kind of rotary scaling and its numbers, where the file has them.

        Raises:
            ModelError: for an unknown kind, and for values that are not positive numbers.
        """
        for scaling in [*self._rotary_objects(), self.raw]:
            kind = self._rotation_kind(scaling)
            for key in ("rope_theta", "partial_rotary_factor", *_NUMBERS[kind]):
                if scaling.get(key) is not None:
                    self._positive(key, scaling[key])

    def rotation(
        self,
        *,
        layer_type: str | None = None,
        theta: float | None = None,
        partial: float = 1.0,
        interleaved: bool = False,
        scaled: bool = True,
        dims: int | None = None,
    ) -> Rotation:
        """Rotary embedding of the whole model, or of the layers of one type.

        Args:
            layer_type: Type of the layers, for files with settings per layer type.
            theta: Default of ``rope_theta`` of the layer type.
            partial: Default of ``partial_rotary_factor``, the fraction of each head that is rotated.
            interleaved: See :class:`~mindspeed_simpo.model.description.Rotation`.
            scaled: False where ``rope_scaling`` does not apply to these layers.
            dims: Rotated elements of each head, where the file names their number instead of a fraction.

        Raises:
            ModelError: for an unknown kind, and for numbers that are missing or not positive.
        """
        scaling = self._scaling(layer_type, scaled=scaled)
        kind = self._rotation_kind(scaling)
        theta = scaling.get("rope_theta", theta if theta is not None else self.raw.get("rope_theta", 10000.0))
        given = {"rope_theta": theta, "partial_rotary_factor": self._partial(scaling, partial)}
        outer = self.raw.get("original_max_position_embeddings")
        scaling = {"original_max_position_embeddings": outer or self.hf.max_position_embeddings} | scaling
        if outer:  # transformers prefers the value outside of rope_scaling
            scaling["original_max_position_embeddings"] = outer
        given |= {key: scaling.get(key) for key in _NUMBERS[kind]}
        numbers = {key: self._positive(key, value) for key, value in given.items()}
        whole = self.head_dim if dims is None else dims
        dims = int(whole * numbers["partial_rotary_factor"])
        if dims % 2 or not 0 < dims <= whole:
            raise self.error(
                f"head_dim {whole} x partial_rotary_factor {numbers['partial_rotary_factor']:g} gives {dims} "
                "rotated numbers; rotary embeddings need an even number of them, at most head_dim"
            )
        variants = self._variants(kind, scaling, numbers, dims)
        return Rotation(numbers["rope_theta"], dims, kind, interleaved, **variants)

    def score_factor(self) -> float:
        """DeepSeek's factor of queries and keys under a scaled rotation, ``0.1 mscale_all_dim ln(factor) + 1``; else 1.

        Raises:
            ModelError: for numbers that are not positive.
        """
        scaling = self._scaling(None, scaled=True)
        if self._rotation_kind(scaling) == "default" or not scaling.get("mscale_all_dim"):
            return 1.0
        factor, mscale = (self._positive(key, scaling.get(key)) for key in ("factor", "mscale_all_dim"))
        return _magnitude(factor, mscale)

    def _rotary_objects(self) -> list[dict[str, Any]]:
        scaling = self.raw.get("rope_scaling") or self.raw.get("rope_parameters") or {}
        if not isinstance(scaling, dict):
            raise self.error(f"rope_scaling or rope_parameters is not an object: {scaling!r}")
        nested = [each for each in scaling.values() if isinstance(each, dict)]
        return nested or [scaling]

    def _scaling(self, layer_type: str | None, *, scaled: bool) -> dict[str, Any]:
        # transformers 5 writes one rope_parameters object, with one object per layer type where types differ;
        # transformers 4 wrote rope_theta and, for scaled rotations, rope_scaling
        parameters = self.raw.get("rope_parameters") or {}
        nested = any(isinstance(each, dict) for each in parameters.values())
        own = (parameters.get(layer_type) or {}) if nested and layer_type is not None else parameters
        scaling = self.raw.get("rope_scaling") or {} if scaled else {}
        return {**own, **scaling}

    def _rotation_kind(self, scaling: dict[str, Any]) -> RotationKind:
        kind = str(scaling.get("rope_type", scaling.get("type", "default")))
        kind = self._aliases.get(kind, kind)
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

        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            mscale, mscale_all_dim = (self._positive(key, scaling[key]) for key in ("mscale", "mscale_all_dim"))
            return _magnitude(factor, mscale) / _magnitude(factor, mscale_all_dim)
        return _magnitude(factor, 1.0)

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


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
