"""The options, group by group: name, type, default, range, unit and help of every key, and the checks of each group."""

from __future__ import annotations

from mindspeed_simpo.config.options.base import (
    CPU_CHUNK_TOKENS,
    DEFAULT_TEMPLATE_DATE,
    BackendName,
    BatchingForm,
    BatchingName,
    ContextParallelAlgo,
    Options,
    effect_of,
    takes_bool,
)
from mindspeed_simpo.config.options.data import DataOptions
from mindspeed_simpo.config.options.model import ALL_LINEAR, AdapterOptions, ModelOptions
from mindspeed_simpo.config.options.parallel import OutputOptions, ParallelOptions
from mindspeed_simpo.config.options.sources import DataSource, split_weights
from mindspeed_simpo.config.options.task import TaskOptions
from mindspeed_simpo.config.options.training import TrainingOptions
from mindspeed_simpo.config.options.watch import WatchOptions

OPTION_GROUPS: tuple[type[Options], ...] = (
    TaskOptions,
    ModelOptions,
    AdapterOptions,
    DataOptions,
    TrainingOptions,
    ParallelOptions,
    OutputOptions,
    WatchOptions,
)

__all__ = [
    "ALL_LINEAR",
    "CPU_CHUNK_TOKENS",
    "DEFAULT_TEMPLATE_DATE",
    "OPTION_GROUPS",
    "AdapterOptions",
    "BackendName",
    "BatchingForm",
    "BatchingName",
    "ContextParallelAlgo",
    "DataOptions",
    "DataSource",
    "ModelOptions",
    "OutputOptions",
    "ParallelOptions",
    "TaskOptions",
    "TrainingOptions",
    "WatchOptions",
    "effect_of",
    "split_weights",
    "takes_bool",
]
