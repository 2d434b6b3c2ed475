"""Folders of adapters that peft writes, for tests."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.hf import TOKENIZER_OF


@contextmanager
def quiet_peft() -> Iterator[None]:
    """peft reads a property of transformers that newer versions of transformers warn about.

    It also warns that no module has the ranks that it derives for the parameters of experts, which it does use.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def make_adapter(
    folder: str | Path,
    base: str | Path,
    modules: Sequence[str],
    *,
    r: int = 4,
    alpha: float = 8.0,
    std: float = 0.1,
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Write random adapters for a model as peft does; neither factor is zero, so that both have a gradient.

    Those of experts are written as by peft with transformers 4, where each projection is a module.
    """
    from peft import LoraConfig, get_peft_model

    if json.loads((Path(base) / "config.json").read_text())["model_type"] in TOKENIZER_OF:
        return _make_expert_adapter(Path(folder), Path(base), modules, r=r, alpha=alpha, std=std, seed=seed)
    with torch.random.fork_rng(devices=[]), quiet_peft():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base)
        options = {"r": r, "lora_alpha": alpha, "target_modules": list(modules), "task_type": "CAUSAL_LM"}
        adapted = get_peft_model(model, LoraConfig(**options))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = (std * torch.randn_like(parameter)).to(getattr(torch, dtype))
        adapted.save_pretrained(folder)
    return Path(folder)


def _make_expert_adapter(
    folder: Path, base: Path, modules: Sequence[str], *, r: int, alpha: float, std: float, seed: int
) -> Path:
    draw = torch.Generator().manual_seed(seed)
    factors = {}
    for file in sorted(base.glob("*.safetensors")):
        for name, weight in sorted(load_file(file).items()):
            path = name.removesuffix(".weight")
            if path.rsplit(".", 1)[-1] in modules:
                outputs, inputs = weight.shape
                for factor, shape in (("A", (r, inputs)), ("B", (outputs, r))):
                    factors[f"base_model.model.{path}.lora_{factor}.weight"] = std * torch.randn(shape, generator=draw)
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": list(modules), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
