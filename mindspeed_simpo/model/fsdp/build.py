"""Models of transformers, built shard by shard."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.fsdp import attention


def empty_model(folder: Path) -> PreTrainedModel:
    """The model of ``config.json`` on the meta device: its modules and shapes, without values.

    Raises:
        ModelError: where transformers does not know the model, or would run code of the checkpoint.
    """
    attention.register()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention.NAME, trust_remote_code=False
            )
    except (ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{folder / 'config.json'}: transformers cannot build this model: {reason}") from None
    return model


def layer_names(model: PreTrainedModel) -> list[str]:
    """Names of the decoder layers, which are sharded and recomputed one by one.

    Raises:
        ModelError: where the model has none that transformers marks.
    """
    names = [name for name, part in model.named_modules() if isinstance(part, GradientCheckpointingLayer)]
    if not names:
        raise ModelError(f"{type(model).__name__} has no layers that transformers marks as such")
    return names


def load_model(
    folder: Path, names: list[str], dtype: torch.dtype, *, world: int, shards: int, bf16: bool, offload: bool
) -> PreTrainedModel:
    """The model with its weights; each rank reads its shard of them. A collective of the world.

    Args:
        folder: Hugging Face folder.
        names: Of :func:`layer_names`.
        dtype: Of the parameters.
        world: Number of ranks.
        shards: Number of ranks that divide the parameters; the others hold copies.
        bf16: Whether products are computed in bf16.
        offload: Whether parameters are held in host memory.
    """
    options: dict[str, Any] = {}
    if world > 1:
        options["distributed_config"] = DistributedConfig(
            fsdp_size=shards,
            dp_replicate_size=world // shards,
            fsdp_plan=dict.fromkeys((re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names), "free_full_weight"),
            fsdp_cpu_offload=offload,
            fsdp_mixed_precision=bf16,
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=False, use_safetensors=True, **options
    )
    if world == 1:
        shard(model, names, bf16=bf16, offload=offload)
    register_fsdp_forward_method(model, "score")
    return model


def shard(model: PreTrainedModel, names: list[str], *, bf16: bool, offload: bool) -> None:
    """Shard a model whose weights this rank has all of, over a mesh of one rank."""
    options: dict[str, Any] = {"mesh": init_device_mesh(model.device.type, (1,))}
    if bf16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for name in names:
        fully_shard(model.get_submodule(name), **options)
    fully_shard(model, **options)
