"""The training engine without data loading and output, for measurements and tests."""

from __future__ import annotations

from typing import Any

import torch

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.device import Device


def build_engine(
    config: Config, device: Device, groups: Any, table: Any = None, running: Any = None
) -> tuple[list[torch.nn.Module], Any]:
    """The model with its starting weights, wrapped for training, and the schedule of the configured step.

    Args:
        config: Its data is not read, and neither is the tokenizer of its model.
        device: Opened.
        groups: Of the layout that ``config`` has on these ranks.
        table: Sums under a reference model.
        running: Statistics of the objective's tracked value, a function.
    """
    from mindspeed_simpo.model.hf_config import read_description
    from mindspeed_simpo.model.megatron.gpt import build_model
    from mindspeed_simpo.model.megatron.weights import fill_adapters, fill_weights
    from mindspeed_simpo.training.optimizer import wrap_for_training
    from mindspeed_simpo.training.session import build_schedule

    spec = read_description(config.model_name_or_path)
    models = build_model(spec, config, groups, device)
    fill_weights(models, spec, config, groups, config.seed)
    fill_adapters(models, spec, config, groups, config.seed)
    wrapped = wrap_for_training(models, config, bf16=config.bf16_in_use)
    return wrapped, build_schedule(config, spec, groups, device, running, wrapped, table)
