"""The folder of a model: a local one, or that of a hub id in the Hugging Face cache."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mindspeed_simpo.errors import ModelError

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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model's folder.

    Raises:
        ModelError: naming the file.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist: {path.parent} is not a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} is not a JSON object")
    return raw
