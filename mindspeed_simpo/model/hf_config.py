"""``config.json`` of a Hugging Face folder or hub model -> :class:`ModelDescription`, with checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.model.families import families
from mindspeed_simpo.model.folder import read_json, resolve_model
from mindspeed_simpo.model.settings import Family, Settings


def read_description(model_name_or_path: str) -> ModelDescription:
    """Read and check the ``config.json`` of a model, without its weights. Code in the checkpoint is never run.

    Args:
        model_name_or_path: See :func:`~mindspeed_simpo.model.folder.resolve_model`.

    Raises:
        ModelError: for a folder without a readable configuration, an architecture that is not supported, quantized
            weights, or a variant (rotary scaling, activation, attention pattern) that is not implemented.
    """
    path = resolve_model(model_name_or_path, weights=False) / "config.json"
    raw = read_json(path)
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


def _hf_config(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{path} is not a configuration that transformers accepts: {reason}") from None
