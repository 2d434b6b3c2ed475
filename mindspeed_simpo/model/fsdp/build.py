"""Models of transformers, built shard by shard."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.folder import read_json
from mindspeed_simpo.model.fsdp import attention
from mindspeed_simpo.model.fsdp.quantized import four_bits, keep_arithmetic, quantized_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sharding:
    """How the parameters lie on the ranks."""

    layer_names: Sequence[str]
    """Modules that are gathered, and freed, one by one."""
    world: int
    shards: int
    """Ranks that divide the parameters, consecutive ones; the others hold copies."""
    bf16: bool
    """Whether products are computed in bf16; gradients are reduced in fp32."""
    offload: bool
    """Whether parameters are held in host memory."""
    stored_dtype: torch.dtype
    """Of the parameters between the steps."""
    device_type: str
    quantized: bool = False
    """Whether linear layers are held in 4 bits, whole on every rank."""


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a model, of a class of transformers; without dropout, which preference training has off.

    Raises:
        ModelError: where only code in the checkpoint has its class.
    """
    path = folder / "config.json"
    raw = read_json(path)
    if "auto_map" in raw and raw.get("model_type") not in CONFIG_MAPPING:
        raise ModelError(
            f"{path}: the model of type {raw.get('model_type')!r} asks for code in its folder to be run (auto_map), "
            "which is never done: trust_remote_code stays off. Choose a checkpoint whose class is in transformers, or "
            "install a newer transformers that has it"
        )
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for each in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for name in [] if each is None else _random_in_training(each):
            setattr(each, name, 0.0)
    return config


def _random_in_training(config: PreTrainedConfig) -> list[str]:
    """Settings of dropout and of noise, such as ``attention_dropout``, ``resid_pdrop`` and ``router_jitter_noise``."""
    return [
        name
        for name, value in vars(config).items()
        if isinstance(value, float) and any(part in name for part in ("drop", "jitter"))
    ]


def empty_model(folder: Path) -> PreTrainedModel:
    """The model of ``config.json`` on the meta device: its modules and shapes, without values.

    Raises:
        ModelError: where transformers does not know the model, or would run code of the checkpoint.
    """
    attention.register()
    try:
        config = read_config(folder)
        with torch.device("meta"):
            return _from_config(config)
    except (ValueError, KeyError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        if attention.NAME in reason:
            reason = "its attention does not go through the interface of transformers"
        raise ModelError(f"{folder / 'config.json'}: backend: fsdp cannot train this model: {reason}") from None


def layer_names(model: PreTrainedModel) -> list[str]:
    """Names of the layers of decoder and vision tower, which are sharded one by one.

    Raises:
        ModelError: where the model has none that transformers marks.
    """
    names = [name for name, part in model.named_modules() if isinstance(part, GradientCheckpointingLayer)]
    if not names:
        raise ModelError(f"{type(model).__name__} has no layers that transformers marks as such")
    return names


def takes_images(config: PreTrainedConfig) -> bool:
    """Whether transformers has a class for images and text with this configuration."""
    return type(config) in AutoModelForImageTextToText._model_mapping


def decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """The decoder without a vision tower: the base model itself of a model that takes text only."""
    found: torch.nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    return found


def parameters_of_text(model: PreTrainedModel) -> set[torch.nn.Parameter]:
    """The parameters of embedding, decoder and output layer: all but those of a vision tower and its projection."""
    get_output: Any = model.get_output_embeddings
    parts = model.get_input_embeddings(), decoder_of(model), get_output()
    return {parameter for part in parts if part is not None for parameter in part.parameters()}


def load_model(folder: Path, sharding: Sharding) -> PreTrainedModel:
    """The model with its weights; each rank reads its shard of them. A collective of the world.

    Raises:
        ModelError: where the weights cannot be read, or do not fit ``config.json``.
    """
    sharded = sharding.world > 1 and not sharding.quantized and not _may_turn_shards(empty_model(folder))
    try:
        try:
            model, report = _loaded(folder, sharding, sharded=sharded)
        except RuntimeError:
            if not sharded:
                raise
            # transformers tells some layouts of weights by their whole shapes, which a shard has not
            logger.warning("%s: these weights cannot be read shard by shard: each rank reads all of them", folder)
            sharded = False
            model, report = _loaded(folder, sharding, sharded=False)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ModelError(f"{folder}: transformers cannot load the weights: {' '.join(str(error).split())}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            raise ModelError(f"{folder}: the safetensors do not fit config.json: {kind.replace('_', ' ')} {names[:3]}")
    keep_arithmetic(model)
    if not sharded:
        shard(model, sharding)
    return model


def _loaded(folder: Path, sharding: Sharding, *, sharded: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, sharded or not, and the report of transformers on the names of the weights."""
    options: dict[str, Any] = {}
    if sharding.quantized:
        options["quantization_config"] = four_bits(torch.bfloat16 if sharding.bf16 else torch.float32)
    elif sharded:
        plan = {re.sub(r"\.\d+(?=\.|$)", ".*", name): "free_full_weight" for name in sharding.layer_names}
        options["distributed_config"] = DistributedConfig(
            fsdp_size=sharding.shards,
            dp_replicate_size=sharding.world // sharding.shards,
            fsdp_plan=plan,
            fsdp_cpu_offload=sharding.offload,
            fsdp_mixed_precision=sharding.bf16,
        )
    config = read_config(folder)
    for each in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if each is not None:
            each.base_model_fsdp_plan = {}  # type: ignore[misc]
    model, report = _loadable(_auto_class(config)._model_mapping[type(config)]).from_pretrained(
        folder,
        config=config,
        dtype=sharding.stored_dtype,
        attn_implementation=_attention_of(config),
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    return model, report


def _may_turn_shards(model: PreTrainedModel) -> bool:
    """Whether transformers would turn matrices of experts that are as wide as high, where it reads shards of them."""
    conversions = (each for each in get_model_conversion_mapping(model) if isinstance(each, WeightConverter))
    turned = any(getattr(step, "check_dims", False) for each in conversions for step in each.operations)
    return turned and any(each.dim() == 3 and each.shape[1] == each.shape[2] for each in model.parameters())


def _loadable(model_class: Any) -> Any:
    """The class as FSDP2 can shard it while it is loaded.

    It has no plan of its own, so that the output weight belongs to the root, where the head reads it. Weights are tied
    before they are sharded: FSDP2 would hold those that are tied later twice.
    """

    def distribute(cls: Any, model: Any, *others: Any) -> Any:
        model.tie_weights()
        return model_class.maybe_distribute_model.__func__(cls, model, *others)

    changes = {"_fsdp_plan": {}, "maybe_distribute_model": classmethod(distribute)}
    return type(model_class.__name__, (model_class,), {"__module__": model_class.__module__, **changes})


def random_model(folder: Path, sharding: Sharding, seed: int) -> PreTrainedModel:
    """The model of ``config.json`` with random weights, the same on every layout; each rank draws the whole model."""
    attention.register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = read_config(folder)
        model = _from_config(config, dtype=torch.float32)
    torch.nn.Module.to(model, sharding.stored_dtype)
    shard(model, sharding)
    return model


def shard(model: PreTrainedModel, sharding: Sharding) -> None:
    """Shard a model whose weights this rank has all of."""
    copies = sharding.world // sharding.shards
    shape = (sharding.world,) if copies == 1 else (copies, sharding.shards)
    options: dict[str, Any] = {"mesh": init_device_mesh(sharding.device_type, shape)}
    if sharding.bf16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if sharding.offload:
        options["offload_policy"] = CPUOffloadPolicy()
    if sharding.quantized:
        options["ignored_params"] = set(quantized_weights(model))
    for name in sharding.layer_names:
        fully_shard(model.get_submodule(name), **options)
    fully_shard(model, **options)


def recompute(model: PreTrainedModel, names: Sequence[str], checkpointed: Callable[..., Any]) -> None:
    """Have the backward compute the named layers again, by ``checkpointed(layer, *inputs)``."""
    for name in names:
        layer: Any = model.get_submodule(name)
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = checkpointed


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _auto_class(config: PreTrainedConfig) -> Any:
    return AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM


def _attention_of(config: PreTrainedConfig) -> str | dict[str, str]:
    """The attention of this package for the decoder; a vision tower keeps the one that transformers chooses."""
    text = config.get_text_config()
    keys = [key for key in config.sub_configs if getattr(config, key, None) is text]
    return {keys[0]: attention.NAME} if keys else attention.NAME


def _from_config(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = _auto_class(config).from_config(
        config, attn_implementation=_attention_of(config), trust_remote_code=False, **options
    )
    return model
