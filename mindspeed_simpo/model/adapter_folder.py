"""Folders of adapters as peft writes and reads them: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mindspeed_simpo.config.options import ALL_LINEAR
from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.adapters import Adapters, projections
from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.model.slots import Span

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_rslora": (False,),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "exclude_modules": (None, []),
    "trainable_token_indices": (None,),
}
"""Keys of peft that change what an adapter is -> the values of the adapters here."""
_SHOWN = 3


class AdapterFolder:
    """The factors in a folder of peft, checked on opening, then read slice by slice.

    Args:
        folder: The value of ``lora_load``.
        adapters: The adapters that the folder has to hold.
        model: Description of the model that they belong to.

    Raises:
        ModelError: where the folder cannot be read, or holds other adapters: of another rank, scale or kind, of other
            modules, or of a model of another shape.
    """

    def __init__(self, folder: Path, adapters: Adapters, model: ModelDescription) -> None:
        self.folder = folder
        _check_config(folder, adapters, model)
        try:
            self._file: Any = safe_open(folder / WEIGHTS_FILE, framework="pt", device="cpu")
        except FileNotFoundError:
            pickled = "; adapter_model.bin is pickle, which is never read: save the adapter as safetensors"
            hint = pickled if (folder / "adapter_model.bin").is_file() else ""
            raise ModelError(f"lora_load: {folder} has no {WEIGHTS_FILE}{hint}") from None
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{folder / WEIGHTS_FILE} is truncated or not a safetensors file: {error}") from None
        self._check_tensors(adapters, model)

    def read(self, span: Span) -> Tensor:
        """See :class:`~mindspeed_simpo.model.weight_source.WeightSource`; in the stored dtype."""
        assert span.tensor is not None, "padding is not read"
        part = self._file.get_slice(_PREFIX + span.tensor.name)
        whole: Tensor = part[:, span.start : span.stop] if span.tensor.axis == 1 else part[span.start : span.stop]
        return whole

    def _check_tensors(self, adapters: Adapters, model: ModelDescription) -> None:
        path = self.folder / WEIGHTS_FILE
        expected = {_PREFIX + tensor.name: tensor.shape for tensor in adapters.hf_tensors(model)}
        stored = set(self._file.keys())
        for names, problem in ((expected.keys() - stored, "lacks"), (stored - expected.keys(), "also holds")):
            if names:
                raise ModelError(
                    f"{path} {problem} {_some(names)}, with {model.num_layers} layers of {model.family} and "
                    f"lora_target_modules {', '.join(adapters.modules)}: is it an adapter of this model?"
                )
        for name, shape in expected.items():
            found = tuple(self._file.get_slice(name).get_shape())
            if found != shape:
                raise ModelError(
                    f"{path}: {name} has shape {list(found)}; the model and lora_r give {list(shape)}: the adapter "
                    "belongs to a model of another shape"
                )


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], adapters: Adapters, model: ModelDescription, base: str
) -> None:
    """Write the two files that peft reads.

    Where projections of experts have adapters, peft with transformers 5 takes their names out of ``target_modules``, so
    that ``target_parameters`` names the weights of other projections that are called alike.

    Args:
        folder: An existing folder.
        tensors: Every factor, by the names of :meth:`~mindspeed_simpo.model.adapters.Adapters.hf_tensors`.
        adapters: Their rank, scale, modules and dropout; peft has none of experts' projections.
        model: Description of the model that they belong to.
        base: ``base_model_name_or_path``.
    """
    named = {_PREFIX + name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    alpha = int(adapters.alpha) if float(adapters.alpha).is_integer() else adapters.alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapters.r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if adapters.adapt_experts(model) else adapters.dropout,
        "target_modules": list(adapters.modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_parameters": adapters.beside_experts(model) or None,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``W + scale B A``, computed and returned in fp32."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)


def _check_config(folder: Path, adapters: Adapters, model: ModelDescription) -> None:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, targets = config.get("peft_type"), config.get("target_modules")
    except (OSError, UnicodeDecodeError, ValueError, AttributeError) as error:
        raise ModelError(f"lora_load: {path} cannot be read ({error}): give a folder that peft wrote") from None
    if kind != "LORA":
        raise ModelError(f"{path}: peft_type is {kind}; only LORA adapters can be trained on")
    if joined := sorted(set(config.get("target_parameters") or ()) - set(adapters.beside_experts(model))):
        raise ModelError(
            f"{path}: target_parameters has {', '.join(joined)}: peft makes such factors for all experts at once, and "
            "one A for what each expert has two of; adapters here have A and B for each projection of each expert"
        )
    for key, plain in _PLAIN.items():
        if config.get(key, plain[0]) not in plain:
            raise ModelError(f"{path}: {key} is {config[key]}; adapters here have {key} {plain[0]}")
    for key, found, ours in (
        ("r", config.get("r"), adapters.r),
        ("lora_alpha", config.get("lora_alpha"), adapters.alpha),
    ):
        if found != ours:
            option = key if key.startswith("lora") else f"lora_{key}"
            raise ModelError(f"{path}: {key} is {found}; the configuration has {ours:g}: set {option}: {found}")
    modules = projections(model) if targets == ALL_LINEAR else targets if isinstance(targets, list) else [str(targets)]
    if tuple(sorted(modules)) != adapters.modules:
        raise ModelError(
            f"{path}: target_modules is {', '.join(sorted(modules))}; the configuration has "
            f"{', '.join(adapters.modules)}: set lora_target_modules to those of the adapter"
        )


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
