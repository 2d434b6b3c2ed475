"""Adapters by peft. Every rank has them whole: they are about a hundredth of the weights."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mindspeed_simpo.config.options import ALL_LINEAR, AdapterOptions
from mindspeed_simpo.errors import ConfigError, ModelError
from mindspeed_simpo.model.export_folder import write_on_first_rank
from mindspeed_simpo.model.fsdp.build import decoder_of
from mindspeed_simpo.model.fsdp.dropout import ForwardTokens, mask_inputs
from mindspeed_simpo.model.tokenizer_files import write_tokenizer

_AXES_OF_EXPERTS = 3


def add_adapters(causal: PreTrainedModel, options: AdapterOptions, tokens: ForwardTokens) -> PeftModel:
    """Add adapters in fp32 to the model, in place; the model's own weights are frozen.

    Args:
        causal: The sharded model.
        options: The ``lora_*`` keys. Random factors come from torch's generator, which has one seed on all ranks.
        tokens: Says which tokens a forward has, for dropout.

    Raises:
        ConfigError: where the model has none of the modules, or dropout is asked for of experts in one parameter.
        ModelError: where ``lora_load`` cannot be read or has another rank, scale or modules.
    """
    modules, parameters = _targets(causal, options.lora_target_modules)
    if parameters and options.lora_dropout:
        raise ConfigError(
            f"lora_dropout: peft has none for the experts of {type(causal).__name__}, which one parameter holds "
            f"({parameters[0]}): remove lora_dropout, or {parameters[0].rpartition('.')[2]} from lora_target_modules"
        )
    wanted = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha_in_use,  # type: ignore[arg-type]
        lora_dropout=options.lora_dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks models for what newer versions of transformers call otherwise
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(causal, wanted)
    if options.lora_load is not None:
        _load(adapted, options.lora_load)
    if options.lora_dropout:
        mask_inputs(adapted, options.lora_dropout, tokens)
    return adapted


def _targets(causal: PreTrainedModel, names: str | list[str]) -> tuple[list[str], list[str]]:
    """What to adapt in the decoder: linear layers, and parameters that hold a projection of all experts of a layer.

    ``all-linear`` are the linear layers, as in peft. They are given by the last parts of their names, but one by one
    where peft would take these for those of experts or of a vision tower.
    """
    output: Any = causal.get_output_embeddings
    decoder = set(decoder_of(causal).modules())
    every = [
        (name, part)
        for name, part in causal.named_modules()
        if isinstance(part, torch.nn.Linear) and part is not output()
    ]
    of_experts = [name for name, parameter in causal.named_parameters() if parameter.dim() == _AXES_OF_EXPERTS]
    linear = [name for name, part in every if part in decoder]
    known = sorted({_last_part(name) for name in (*linear, *of_experts)})
    wanted = [names] if isinstance(names, str) else names
    for name in wanted:
        if name not in (ALL_LINEAR, *known):
            near = difflib.get_close_matches(name, known, 1, 0)
            raise ConfigError(
                f"lora_target_modules: {type(causal).__name__} has no linear layer {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
    modules = [name for name in linear if ALL_LINEAR in wanted or _last_part(name) in wanted]
    if of_experts or len(linear) < len(every):
        return modules, [name for name in of_experts if _last_part(name) in wanted]
    return sorted({_last_part(name) for name in modules}), []


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _last_parts(names: Any) -> set[str]:
    return {names} if isinstance(names, str) else {_last_part(name) for name in names or ()}


def _load(adapted: PeftModel, folder: str) -> None:
    try:
        stored = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"lora_load: {folder} is not a folder that peft reads: {error}") from None
    own = adapted.peft_config["default"]
    for name in ("r", "lora_alpha", "target_modules", "target_parameters"):
        theirs, ours = (getattr(each, name, None) for each in (stored, own))
        if name.startswith("target"):
            theirs, ours = _last_parts(theirs), _last_parts(ours)
        if theirs != ours:
            raise ModelError(f"lora_load: {folder} has {name} {theirs}, and the run has {ours}")
    found = adapted.load_adapter(folder, "default", is_trainable=True)
    if found.unexpected_keys:
        raise ModelError(f"lora_load: {folder} has {found.unexpected_keys[0]}, which the model does not have")


def write_adapters(
    adapted: PeftModel,
    base: str,
    source: Path,
    output: Path,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
) -> None:
    """Write the adapters as a folder of peft, with the tokenizer; a collective, in which rank 0 writes.

    Args:
        adapted: The model with its adapters.
        base: What the adapters name as their model: a folder or a hub id.
        source: Hugging Face folder that the model was built from.
        output: Folder to write.
        tokenizer: See :func:`~mindspeed_simpo.model.tokenizer_files.write_tokenizer`.
        chat_template: See :func:`~mindspeed_simpo.model.tokenizer_files.write_tokenizer`.
    """

    def write(folder: Path) -> None:
        adapted.peft_config["default"].base_model_name_or_path = base
        factors = {name: value for name, value in adapted.state_dict().items() if ".lora_" in name}
        adapted.save_pretrained(str(folder), state_dict=factors, save_embedding_layers=False)
        write_tokenizer(source, folder, tokenizer, chat_template)

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
