"""Adapters by peft. Every rank has them whole: they are about a hundredth of the weights."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from mindspeed_simpo.config.options import ALL_LINEAR, AdapterOptions
from mindspeed_simpo.errors import ConfigError, ModelError
from mindspeed_simpo.model.export_folder import Companions, write_on_first_rank
from mindspeed_simpo.model.fsdp.build import decoder_of
from mindspeed_simpo.model.fsdp.dropout import ForwardTokens, mask_inputs

_AXES_OF_EXPERTS = 3


def add_adapters(causal: PreTrainedModel, options: AdapterOptions, tokens: ForwardTokens) -> PeftModel:
    """Add adapters in fp32 to the model, in place; the model's own weights are frozen.

    Args:
        causal: The sharded model.
        options: The ``lora_*`` keys. Random factors come from torch's generator, which has one seed on all ranks.
        tokens: Says which tokens a forward has, for dropout.

    Raises:
        ConfigError: where the model lacks a module, or peft cannot adapt it, as with dropout for parameters of experts.
        ModelError: where ``lora_load`` cannot be read or has another rank, scale or modules.
    """
    wanted = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha_in_use,  # type: ignore[arg-type]
        lora_dropout=options.lora_dropout,
        task_type="CAUSAL_LM",
        **_targets(causal, options.lora_target_modules),
    )
    try:
        with _quiet():
            adapted = get_peft_model(causal, wanted)
    except ValueError as error:
        advice = "name other modules in lora_target_modules"
        if options.lora_dropout:
            advice += ", or remove lora_dropout"
        reason = " ".join(str(error).split())
        raise ConfigError(f"peft cannot adapt {type(causal).__name__}: {reason}: {advice}") from None
    if options.lora_load is not None:
        _load(adapted, options.lora_load)
    if options.lora_dropout:
        mask_inputs(adapted, options.lora_dropout, tokens)
    return adapted


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside of the context, peft's warnings about itself are not shown.

    It asks models for what newer versions of transformers call otherwise, and misses modules with the ranks that it
    derives for parameters of experts, which it does use.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        yield


def _targets(causal: PreTrainedModel, names: str | list[str]) -> dict[str, Any]:
    """What peft adapts in the decoder: linear layers, and parameters that hold a projection of all experts of a layer.

    peft resolves ``all-linear``, and the names that projections of experts have on disk.
    """
    output: Any = causal.get_output_embeddings
    decoder = set(decoder_of(causal).modules())
    every = [
        (name, part)
        for name, part in causal.named_modules()
        if isinstance(part, torch.nn.Linear) and part is not output()
    ]
    linear = {_last_part(name) for name, part in every if part in decoder}
    of_experts = [name for name, parameter in causal.named_parameters() if parameter.dim() == _AXES_OF_EXPERTS]
    known = sorted({*linear, *map(_last_part, of_experts), *_stored_projections(causal)})
    wanted = [names] if isinstance(names, str) else names
    for name in wanted:
        if name not in (ALL_LINEAR, *known):
            near = difflib.get_close_matches(name, known, 1, 0)
            raise ConfigError(
                f"lora_target_modules: {type(causal).__name__} has no linear layer {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
    parameters = [name for name in of_experts if _last_part(name) in wanted and _last_part(name) not in linear]
    modules = [name for name in wanted if name not in set(map(_last_part, parameters))]
    return {
        "target_modules": ALL_LINEAR if ALL_LINEAR in wanted else modules,
        "target_parameters": parameters or None,
        "exclude_modules": [name for name, part in every if part not in decoder] or None,
    }


def _stored_projections(causal: PreTrainedModel) -> set[str]:
    """Last parts of the names that projections of experts have on disk, where transformers joins them."""
    conversions = (each for each in get_model_conversion_mapping(causal) if isinstance(each, WeightConverter))
    patterns = (pattern for each in conversions for pattern in each.source_patterns if ".experts." in pattern)
    return {_last_part(pattern.removesuffix(".weight")) for pattern in patterns}


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _load(adapted: PeftModel, folder: str) -> None:
    own = adapted.peft_config["default"]
    try:
        stored = PeftConfig.from_pretrained(folder)
        for name in ("r", "lora_alpha"):
            theirs, ours = (getattr(each, name, None) for each in (stored, own))
            if theirs != ours:
                raise ModelError(f"lora_load: {folder} has {name} {theirs}, and the run has {ours}")
        with _quiet():
            found = adapted.load_adapter(folder, "default", is_trainable=True)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"lora_load: {folder} is not a folder that peft reads: {error}") from None
    except RuntimeError as error:
        raise ModelError(f"lora_load: {folder} does not fit the model: {' '.join(str(error).split())}") from None
    for kind, names in (("also has", found.unexpected_keys), ("lacks", found.missing_keys)):
        if factors := [name for name in names if ".lora_" in name]:
            raise ModelError(
                f"lora_load: {folder} {kind} {factors[0]}: set lora_target_modules to those of the folder, "
                f"{_shown(stored)}"
            )


def _shown(stored: PeftConfig) -> str:
    found: list[str] = []
    for key in ("target_modules", "target_parameters"):
        names = getattr(stored, key, None) or ()
        found += [names] if isinstance(names, str) else names
    return ", ".join(sorted(set(map(_last_part, found))))


def write_adapters(
    adapted: PeftModel,
    base: str,
    beside: Companions,
    output: Path,
) -> None:
    """Write the adapters as a folder of peft, with the files beside them; a collective, in which rank 0 writes.

    Args:
        adapted: The model with its adapters.
        base: What the adapters name as their model: a folder or a hub id.
        beside: The files beside the weights; the card takes the place of the one that peft writes.
        output: Folder to write.
    """

    def write(folder: Path) -> None:
        adapted.peft_config["default"].base_model_name_or_path = base
        factors = {name: value for name, value in adapted.state_dict().items() if ".lora_" in name}
        adapted.save_pretrained(str(folder), state_dict=factors, save_embedding_layers=False)
        beside.write(folder)

    write_on_first_rank(output, iter(()), write)


def deltas(causal: PreTrainedModel) -> dict[str, Callable[[], Tensor]]:
    """What adapters add to each adapted weight, ``alpha / r B A``, by the weight's name in transformers."""
    found: dict[str, Callable[[], Tensor]] = {}
    for path, module in causal.named_modules():
        if isinstance(module, LoraLayer):
            name = f"{base_name(path)}.{getattr(module, 'parameter_name', 'weight')}"
            found[name] = partial(_delta, module)
    return found


def _delta(layer: Any) -> Tensor:
    delta: Tensor = layer.get_delta_weight("default")
    return delta


def base_name(name: str) -> str:
    """The name in transformers of a module or parameter under the wrappers of peft."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
