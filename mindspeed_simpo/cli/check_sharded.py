"""What ``check`` says of a model with ``backend: fsdp``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.config.resolution import resolve
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.folder import resolve_model
from mindspeed_simpo.model.fsdp.description import TransformersModel, describe
from mindspeed_simpo.training.fsdp.memory import sharded_state


def described(config: Config, world_size: int, device: str) -> TransformersModel:
    """The description of the model, whose weights are there.

    Raises:
        SimpoError: where training would stop with an error.
    """
    model = describe(config.model_name_or_path)
    model.check_length(config.seq_length)
    model.check_freezing(config.freeze_vision, adapted=config.lora_r > 0)
    make_layout(resolve(config, model, device), world_size, None, device)
    if config.init_from == "weights":
        folder = resolve_model(config.model_name_or_path, weights=True)
        if not any(folder.glob("*.safetensors")):
            raise ModelError(f"{folder} has no safetensors files")
    return model


def print_layout(console: Console, config: Config, layout: Layout, model: TransformersModel) -> None:
    """Print the layout and what a rank holds."""
    shards = config.fsdp_shard_size or layout.ranks
    pairs = config.global_batch_size // layout.data
    console.print(
        f"{model.family} of transformers, {model.parameters:,} parameters{', frozen' if config.lora_r else ''}; "
        f"shards {shards} x copies {layout.ranks // shards}; context {layout.context} x data {layout.data}; "
        f"{pairs} pairs per step on each data-parallel rank",
        soft_wrap=True,
    )
    state = sharded_state(model, config, layout.ranks, pairs // config.micro_batch_size)
    table = Table("GiB per rank, without activations", "")
    for name in ("parameters", "gradients", "optimizer", "gathered", "total"):
        table.add_row(name, f"{getattr(state, name) / 2**30:.3g}")
    console.print(table)
