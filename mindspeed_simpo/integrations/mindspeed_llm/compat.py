"""Checks that MindSpeed-LLM, MindSpeed and Megatron-LM have the classes and functions that the plug-in uses.

Version numbers do not suffice: MindSpeed-LLM 26.0.0, 26.1.0 and master all have the version 26.0.0dev0. The source of
modules that must not be imported yet is parsed instead.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.integrations.mindspeed_llm import stages

_POSTTRAIN = "tasks/posttrain"
_TRAINER_METHODS: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    f"{_POSTTRAIN}/launcher.py": {"": {"get_trainer": ("stage",)}},
    f"{_POSTTRAIN}/base/base_trainer.py": {
        "BaseTrainer": {"__init__": ("self",), "model_provider": ("self", "pre_process", "post_process")}
    },
    f"{_POSTTRAIN}/sft/sft_trainer.py": {
        "SFTTrainer": {"get_batch": ("data_iterator",), "forward_step": ("self", "data_iterator", "model")}
    },
    f"{_POSTTRAIN}/dpo/dpo_trainer.py": {
        "DPOTrainer": {"get_batch": ("data_iterator",), "loss_func": ("self", "input_tensor", "output_tensor")}
    },
    "tasks/preprocess/collator.py": {"PairwiseDataCollatorWithPadding": {"__call__": ("self", "features")}},
}
"""File of mindspeed_llm -> class ("" for the module) -> function -> its leading parameters."""

_PAIRWISE_FLAGS = ("--is-pairwise-dataset", *(stages.flag(key) for key in stages.UPSTREAM_KEYS))


def check() -> None:
    """Refuse a MindSpeed-LLM, MindSpeed or Megatron-LM that lacks what the plug-in uses.

    Raises:
        ConfigError: one message that names everything that is missing.
    """
    missing = [*_missing_in_mindspeed(), *_missing_in_mindspeed_llm(), *_missing_in_megatron()]
    if missing:
        where = ", ".join(_folder(name) or "not found" for name in ("mindspeed_llm", "mindspeed", "megatron.core"))
        raise ConfigError(
            "mindspeed_simpo cannot join this MindSpeed-LLM (tested: 2.2.0, 2.3.0, 26.0.0, 26.1.0 and master with "
            f"their MindSpeed and Megatron-LM core_v0.12.1). Found: {where}. Missing:\n  - " + "\n  - ".join(missing)
        )


def _missing_in_mindspeed() -> Iterator[str]:
    for module, name, attribute, parameters in (
        ("mindspeed.features_manager.feature", "MindSpeedFeature", "add_parser_argument_choices_value", ("parser",)),
        ("mindspeed.features_manager.feature", "MindSpeedFeature", "validate_args", ("self", "args")),
        ("mindspeed.features_manager.feature", "MindSpeedFeature", "register_args", ("self", "parser")),
        ("mindspeed.features_manager.feature", "MindSpeedFeature", "register_patches", ("self", "patch_manager")),
        ("mindspeed.patch_utils", "MindSpeedPatchesManager", "register_patch", ("orig_func_name", "new_func")),
    ):
        try:
            function = getattr(getattr(importlib.import_module(module), name), attribute)
            found = tuple(inspect.signature(function).parameters)
        except (ImportError, AttributeError, TypeError):
            found = ()
        if found[: len(parameters)] != parameters:
            yield f"{module}.{name}.{attribute}({', '.join(parameters)}, ...)"
    yield from _missing_in_features()


def _missing_in_features() -> Iterator[str]:
    try:
        manager = importlib.import_module("mindspeed.features_manager.features_manager").MindSpeedFeaturesManager
        features = {type(feature).__name__: feature for feature in manager.FEATURES_LIST}
    except (ImportError, AttributeError):
        yield "mindspeed.features_manager.features_manager.MindSpeedFeaturesManager.FEATURES_LIST"
        return
    stage = _options(features.get("MegatronBasicFeature")).get("--stage")
    if stage is None or not isinstance(stage.choices, list):
        yield "mindspeed_llm's MegatronBasicFeature with a flag --stage that has a list of choices"
    pairwise = _options(features.get("DPOFeature"))
    for flag in _PAIRWISE_FLAGS:
        if flag not in pairwise:
            yield f"mindspeed_llm's DPOFeature with a flag {flag}"


def _options(feature: Any) -> dict[str, argparse.Action]:
    parser = argparse.ArgumentParser(add_help=False)
    if feature is not None:
        feature.register_args(parser)
    return {option: action for action in parser._actions for option in action.option_strings}


def _missing_in_mindspeed_llm() -> Iterator[str]:
    folder = _folder("mindspeed_llm")
    for file, classes in _TRAINER_METHODS.items():
        functions = _functions(Path(folder, file)) if folder else {}
        for owner, methods in classes.items():
            for name, parameters in methods.items():
                if functions.get((owner, name), ())[: len(parameters)] != parameters:
                    dotted = ".".join(
                        part for part in ("mindspeed_llm", *Path(file).with_suffix("").parts, owner) if part
                    )
                    yield f"{dotted}.{name}({', '.join(parameters)})"


def _missing_in_megatron() -> Iterator[str]:
    folder = _folder("megatron.core")
    if not folder:
        yield "megatron.core (Megatron-LM, tag core_v0.12.1)"
        return
    version = _constants(Path(folder, "package_info.py"))
    if (version.get("MAJOR"), version.get("MINOR")) != (0, 12):
        yield f"megatron.core 0.12 (found {version.get('MAJOR')}.{version.get('MINOR')})"
    schedules = _functions(Path(folder, "pipeline_parallel/schedules.py"))
    if ("", "get_forward_backward_func") not in schedules:
        yield "megatron.core.pipeline_parallel.schedules.get_forward_backward_func"
    for name in (
        "no_pipelining",
        "pipelining_without_interleaving",
        "pipelining_with_interleaving",
    ):
        if "micro_batch_size" not in schedules.get(("", f"forward_backward_{name}"), ()):
            yield f"megatron.core.pipeline_parallel.schedules.forward_backward_{name}(micro_batch_size)"


def _folder(module: str) -> str | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    locations = spec.submodule_search_locations if spec else None
    return next(iter(locations), None) if locations else None


def _parse(path: Path) -> list[ast.stmt]:
    try:
        return ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError):
        return []


def _functions(path: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """(class or "", function) -> names of its parameters."""
    found = {}
    for statement in _parse(path):
        owner, body = ("", [statement]) if not isinstance(statement, ast.ClassDef) else (statement.name, statement.body)
        for item in body:
            if isinstance(item, ast.FunctionDef):
                arguments = item.args
                names = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
                found[owner, item.name] = tuple(argument.arg for argument in names)
    return found


def _constants(path: Path) -> dict[str, Any]:
    return {
        target.id: statement.value.value
        for statement in _parse(path)
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
