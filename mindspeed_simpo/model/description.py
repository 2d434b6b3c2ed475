"""``config.json`` -> :class:`ModelSpec`: what the engine must know of a model, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.errors import ConfigError, ModelError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""``model_type`` of the supported families, and the class that transformers gives each."""

STORED_DTYPES = ("float32", "bfloat16", "float16", "float64")
_HUB_FILES = ["*.json", "*.jinja", "tokenizer*", "vocab*", "merges*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_ROPE_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding; ``kind`` is transformers' ``rope_type``: default, linear or llama3."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: float = 0.0


@dataclass(frozen=True)
class ModelSpec:
    """Shape and variants of a decoder of the Llama kind: RMSNorm, rotary positions, grouped queries, SwiGLU."""

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    tied: bool
    """Whether the output layer is the embedding."""
    logit_softcap: float | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm over each head of the queries and keys, before the rotation (Qwen3)."""
    rms_eps: float
    rope: RopeSpec
    sliding_window: int | None
    """Tokens that attention looks back where a layer has a window; None without one."""
    max_position_embeddings: int
    initializer_range: float
    """Standard deviation of random weights (``init_from: config``)."""
    dtype: str
    """Declared dtype of the stored weights, one of ``STORED_DTYPES``; an export has it too."""

    def padded_vocab_size(self, tensor_parallel_size: int) -> int:
        """Rows of the embedding once every tensor-parallel rank holds equally many."""
        return -(-self.vocab_size // tensor_parallel_size) * tensor_parallel_size

    def check_layout(self, config: Config) -> None:
        """Refuse a layout or a sequence length that this model cannot have.

        Raises:
            ConfigError: where tensor or pipeline ranks do not divide the model.
            ModelError: where ``seq_length`` exceeds the sliding attention window.
        """
        ranks = config.tensor_model_parallel_size
        for name, count in (
            ("num_attention_heads", self.num_heads),
            ("num_key_value_heads", self.num_kv_heads),
            ("intermediate_size", self.ffn_size),
        ):
            if count % ranks:
                raise ConfigError(
                    f"tensor_model_parallel_size {ranks} does not divide the model's {name} {count}: "
                    f"choose a divisor of {count}"
                )
        self._check_stages(config)
        self._check_ulysses(config)
        if self.sliding_window is not None and config.seq_length > self.sliding_window:
            raise ModelError(
                f"{config.model_name_or_path} attends over a sliding window of {self.sliding_window} tokens, which is "
                f"not supported beyond that length: set seq_length ({config.seq_length}) to at most "
                f"{self.sliding_window}"
            )

    def _check_ulysses(self, config: Config) -> None:
        ranks, tensor = config.context_parallel_size, config.tensor_model_parallel_size
        heads, groups = self.num_heads // tensor, self.num_kv_heads // tensor
        if config.context_parallel_algo == "ulysses_cp_algo" and (heads % ranks or (groups % ranks and ranks % groups)):
            raise ConfigError(
                f"context_parallel_algo: ulysses_cp_algo divides the heads of a tensor-parallel rank ({heads} and "
                f"{groups} of keys) over context_parallel_size {ranks}, which is impossible: choose another size or "
                "context_parallel_algo: megatron_cp_algo"
            )

    def _check_stages(self, config: Config) -> None:
        stages, per_stage = config.pipeline_model_parallel_size, config.num_layers_per_virtual_pipeline_stage
        if self.num_layers < stages:
            raise ConfigError(
                f"pipeline_model_parallel_size {stages} is more than the model's num_hidden_layers {self.num_layers}"
            )
        if per_stage is not None and self.num_layers % (stages * per_stage):
            raise ConfigError(
                f"num_layers_per_virtual_pipeline_stage {per_stage} x pipeline_model_parallel_size {stages} does not "
                f"divide the model's num_hidden_layers {self.num_layers}"
            )


def resolve_model(model_name_or_path: str, *, weights: bool) -> Path:
    """Local folder of a model; a hub id is downloaded to, or found in, the Hugging Face cache.

    Args:
        model_name_or_path: A local folder, or a hub id such as ``Qwen/Qwen2.5-0.5B``.
        weights: Fetch the safetensors too, not only the configuration and the tokenizer.

    Raises:
        ModelError: where it is neither a folder nor a hub model that can be had.
    """
    folder = Path(model_name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"model_name_or_path: {folder} is a file; expected a Hugging Face model folder or a hub id")
    if not _HUB_ID.fullmatch(model_name_or_path):
        raise ModelError(f"model_name_or_path: there is no folder {model_name_or_path}")
    from huggingface_hub import snapshot_download

    patterns = [*_HUB_FILES, "model*.safetensors"] if weights else _HUB_FILES
    try:
        return Path(snapshot_download(model_name_or_path, allow_patterns=patterns, ignore_patterns=["original/*"]))
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"model_name_or_path: {model_name_or_path} is neither a local folder nor a hub model that can be "
            f"downloaded: {reason[0]}"
        ) from None


def read_model_spec(model_name_or_path: str) -> ModelSpec:
    """Read and check a model's ``config.json``; no weights are read and no code of the checkpoint is run.

    Raises:
        ModelError: for a folder without a readable configuration, an architecture that is not supported, quantized
            weights, or a variant (rotary scaling, activation, attention pattern) that is not implemented.
    """
    folder = resolve_model(model_name_or_path, weights=False)
    path = folder / "config.json"
    raw = _read_json(path)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise ModelError(f"{path}: model_type {family!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    architectures = raw.get("architectures") or [ARCHITECTURES[family]]
    if architectures != [ARCHITECTURES[family]]:
        raise ModelError(f"{path}: architectures {architectures} is not supported; expected {ARCHITECTURES[family]!r}")
    if raw.get("quantization_config") is not None:
        raise ModelError(f"{path}: the weights are quantized (quantization_config); use the unquantized checkpoint")
    for name in _SIZES:
        value = raw.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ModelError(f"{path}: {name} is {value!r}; expected a whole number of at least 1")
    rope = _rope(path, raw)
    return _spec(path, family, rope, _dtype(path, raw), _hf_config(path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist: {path.parent} is not a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} is not a JSON object")
    return raw


def _hf_config(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{path} is not a configuration that transformers accepts: {reason}") from None


def _spec(path: Path, family: str, rope: RopeSpec, dtype: str, hf: Any) -> ModelSpec:
    attention_bias = bool(getattr(hf, "attention_bias", False)) and family in ("llama", "qwen3")
    heads: int = hf.num_attention_heads
    spec = ModelSpec(
        family=family,
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_heads=heads,
        num_kv_heads=heads if hf.num_key_value_heads is None else hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // heads,
        ffn_size=hf.intermediate_size,
        vocab_size=hf.vocab_size,
        tied=bool(hf.tie_word_embeddings),
        logit_softcap=None,
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family == "llama" and bool(getattr(hf, "mlp_bias", False)),
        qk_norm=family == "qwen3",
        rms_eps=float(hf.rms_norm_eps),
        rope=rope,
        sliding_window=_sliding_window(path, family, hf),
        max_position_embeddings=hf.max_position_embeddings,
        initializer_range=float(hf.initializer_range),
        dtype=dtype,
    )
    _check_shape(path, spec)
    if hf.hidden_act not in ("silu", "swish"):
        raise ModelError(f"{path}: hidden_act {hf.hidden_act!r} is not supported; expected 'silu'")
    return spec


def _check_shape(path: Path, spec: ModelSpec) -> None:
    if spec.num_heads % spec.num_kv_heads:
        raise ModelError(
            f"{path}: num_attention_heads {spec.num_heads} is not a multiple of num_key_value_heads {spec.num_kv_heads}"
        )
    if spec.head_dim % 2:
        raise ModelError(f"{path}: head_dim {spec.head_dim} is odd; rotary embeddings need an even one")


def _rope(path: Path, raw: dict[str, Any]) -> RopeSpec:
    # transformers 5 writes one rope_parameters object; 4 wrote rope_theta and, where scaled, rope_scaling beside it.
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise ModelError(f"{path}: rope_scaling or rope_parameters is not an object: {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", *_ROPE_NUMBERS):
        raise ModelError(f"{path}: rotary scaling {kind!r} is not supported; supported: default, linear, llama3")
    if (scaling.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1) != 1:
        raise ModelError(f"{path}: partial_rotary_factor is not supported; expected 1")
    numbers = {"rope_theta": scaling.get("rope_theta", raw.get("rope_theta", 10000.0))}
    for key in _ROPE_NUMBERS.get(kind, ()):
        numbers[key] = scaling.get(key)
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ModelError(f"{path}: {key} of the rotary embedding is {value!r}; expected a positive number")
    return RopeSpec(theta=float(numbers.pop("rope_theta")), kind=kind, **{k: float(v) for k, v in numbers.items()})


def _sliding_window(path: Path, family: str, hf: Any) -> int | None:
    window: int | None = getattr(hf, "sliding_window", None)
    if family == "mistral":
        return window
    layer_types = set(getattr(hf, "layer_types", None) or ()) if family in ("qwen2", "qwen3") else set()
    if layer_types - {"full_attention", "sliding_attention"}:
        raise ModelError(f"{path}: layer_types {sorted(layer_types)} are not supported; expected 'full_attention'")
    return window if getattr(hf, "use_sliding_window", False) and layer_types != {"full_attention"} else None


def _dtype(path: Path, raw: dict[str, Any]) -> str:
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype not in STORED_DTYPES:
        raise ModelError(f"{path}: dtype {dtype!r} is not supported; supported: {', '.join(STORED_DTYPES)}")
    return str(dtype)
