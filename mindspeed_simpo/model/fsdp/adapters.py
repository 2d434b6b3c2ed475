"""Adapters by peft. Every rank has them whole: they are about a hundredth of the weights."""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mindspeed_simpo.config.options import AdapterOptions
from mindspeed_simpo.errors import ConfigError, ModelError
from mindspeed_simpo.model.adapters import ALL_LINEAR
from mindspeed_simpo.model.export_folder import write_on_first_rank
from mindspeed_simpo.model.fsdp.build import decoder_of
from mindspeed_simpo.model.tokenizer_files import write_tokenizer


def add_adapters(causal: PreTrainedModel, options: AdapterOptions) -> PeftModel:
    """Add adapters in fp32 to the model, in place; the model's own weights are frozen.

    Args:
        causal: The sharded model.
        options: The ``lora_*`` keys. Random factors come from torch's generator, which has one seed on all ranks.

    Raises:
        ConfigError: where the model has none of the modules.
        ModelError: where ``lora_load`` cannot be read or has another rank, scale or modules.
    """
    wanted = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha_in_use,  # type: ignore[arg-type]
        target_modules=_modules(causal, options.lora_target_modules),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks models for what newer versions of transformers call otherwise
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(causal, wanted)
    if options.lora_load is not None:
        _load(adapted, options.lora_load)
    return adapted


def _modules(causal: PreTrainedModel, names: str | list[str]) -> list[str]:
    """The linear layers of the decoder to adapt: by the last parts of their names where no other module has these.

    Else they are named one by one. peft takes such a part also as the name of a projection of experts, which
    transformers holds in one parameter of three axes: those have no adapters here, and nor has a vision tower.
    """
    output: Any = causal.get_output_embeddings
    decoder = set(decoder_of(causal).modules())
    every = [
        (name, part)
        for name, part in causal.named_modules()
        if isinstance(part, torch.nn.Linear) and part is not output()
    ]
    linear = [name for name, part in every if part in decoder]
    known = sorted({name.rpartition(".")[2] for name in linear})
    wanted = [names] if isinstance(names, str) else names
    for name in wanted:
        if name not in (ALL_LINEAR, *known):
            near = difflib.get_close_matches(name, known, 1, 0)
            raise ConfigError(
                f"lora_target_modules: {type(causal).__name__} has no linear layer {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
    chosen = known if ALL_LINEAR in wanted else sorted(set(wanted))
    if len(linear) == len(every) and all(parameter.dim() < 3 for parameter in causal.parameters()):
        return chosen
    return [name for name in linear if name.rpartition(".")[2] in chosen]


def _last_parts(modules: Any) -> set[str]:
    return {modules} if isinstance(modules, str) else {name.rpartition(".")[2] for name in modules or ()}


def _load(adapted: PeftModel, folder: str) -> None:
    try:
        stored = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"lora_load: {folder} is not a folder that peft reads: {error}") from None
    own = adapted.peft_config["default"]
    for name in ("r", "lora_alpha", "target_modules"):
        theirs, ours = (getattr(each, name, None) for each in (stored, own))
        if name == "target_modules":
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


def delta_of(module: torch.nn.Module) -> torch.Tensor | None:
    """``alpha / r B A`` in fp32 of an adapted module; None of any other."""
    active = getattr(module, "get_delta_weight", None)
    return None if active is None else active("default").float()
