"""``config.json`` of a Hugging Face folder or hub model -> :class:`ModelDescription`, with checks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.model.families import families
from mindspeed_simpo.model.settings import Family, Settings

_HUB_FILES = ["*.json", "*.jinja", "tokenizer*", "vocab*", "merges*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve_model(model_name_or_path: str, *, weights: bool) -> Path:
    """Local folder of a model; a hub id is looked up in the Hugging Face cache and downloaded where absent.

    Args:
        model_name_or_path: A local folder, or a hub id such as ``Qwen/Qwen2.5-0.5B``.
        weights: Whether to download the safetensors too, not only the configuration and the tokenizer.

    Raises:
        ModelError: where the name is neither a local folder nor a hub model that can be downloaded.
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


def read_description(model_name_or_path: str) -> ModelDescription:
    """Read and check the ``config.json`` of a model, without its weights. Code in the checkpoint is never run.

    Args:
        model_name_or_path: See :func:`resolve_model`.

    Raises:
        ModelError: for a folder without a readable configuration, an architecture that is not supported, quantized
            weights, or a variant (rotary scaling, activation, attention pattern) that is not implemented.
    """
    path = resolve_model(model_name_or_path, weights=False) / "config.json"
    raw = _read_json(path)
    known = families()
    family = known.get(str(raw.get("model_type")))
    if family is None:
        hints = [
            hint for each in known.values() for name, hint in each.refused.items() if name == raw.get("model_type")
        ]
        hint = f"; {hints[0]}" if hints else ""
        raise ModelError(
            f"{path}: model_type {raw.get('model_type')!r} is not supported; supported: {', '.join(known)}{hint}"
        )
    architectures = raw.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise ModelError(f"{path}: architectures {architectures} is not supported; expected {family.architecture!r}")
    _check_quantization(path, raw, family)
    settings = Settings(path, raw, family)
    settings.check_numbers()
    settings.hf = _hf_config(path)
    return family.describe(settings)


def _check_quantization(path: Path, raw: dict[str, Any], family: Family) -> None:
    quantization = raw.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method not in family.quantizations:
        others = f" or one with quant_method {' or '.join(family.quantizations)}" if family.quantizations else ""
        raise ModelError(
            f"{path}: the weights are quantized (quantization_config with quant_method {method!r}); use the "
            f"unquantized checkpoint{others}"
        )


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
