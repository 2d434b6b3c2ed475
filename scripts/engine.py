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
    from mindspeed_simpo.training.backends import open_backend
    from mindspeed_simpo.training.session import build_schedule

    backend = open_backend(config, groups, device)
    backend.build(starting_weights=True)
    wrapped = backend.for_training()
    return wrapped, build_schedule(config, backend, groups, device, running, wrapped, table)
