"""The schedule of the learning rate, of megatron-core for both backends."""

from __future__ import annotations

import math
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mindspeed_simpo.config.options import TrainingOptions


def learning_rate_schedule(optimizer: Any, training: TrainingOptions, train_iters: int) -> OptimizerParamScheduler:
    """Warm-up and decay of the learning rate; the weight decay is constant.

    Args:
        optimizer: Its parameter groups may have a factor ``wd_mult`` of the weight decay.
        training: ``lr*`` and ``weight_decay``.
        train_iters: Steps over which the learning rate decays.
    """
    steps = max(1, train_iters)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=training.min_lr,
        lr_warmup_steps=min(math.floor(training.lr_warmup_fraction * steps), steps - 1),
        lr_decay_steps=steps,
        lr_decay_style=training.lr_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
