"""megatron-core's DDP, (distributed) Adam and parameter scheduler, set up from the configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.device import Device


def wrap_for_training(models: Sequence[torch.nn.Module], config: Config) -> list[torch.nn.Module]:
    """Wrap pipeline chunks for bf16 inputs and for gradients that are accumulated and reduced in fp32."""
    wrapped = []
    for index, model in enumerate(wrap_precision(models, config)):
        transformer_config = get_model_config(model)
        transformer_config.finalize_model_grads_func = finalize_model_grads
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=config.overlap_grad_reduce,
            use_distributed_optimizer=config.use_distributed_optimizer,
        )
        wrapped.append(DistributedDataParallel(transformer_config, ddp_config, model, disable_bucketing=index > 0))
    if config.overlap_grad_reduce:
        # the schedules reduce after the last micro-batch only where they know how to put it off
        no_sync = [model.no_sync for model in wrapped]
        get_model_config(wrapped[0]).no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def wrap_precision(models: Sequence[torch.nn.Module], config: Config) -> list[torch.nn.Module]:
    """Wrap pipeline chunks for bf16 inputs, where configured; enough for scoring without gradients."""
    if not config.bf16:
        return list(models)
    return [Float16Module(get_model_config(model), model) for model in models]


@dataclass(frozen=True)
class Stepper:
    """Adam with clipping by the true global norm, and its learning-rate schedule."""

    optimizer: Any
    scheduler: OptimizerParamScheduler

    def step(self) -> tuple[float, float]:
        """Clip, update the parameters, advance the schedule.

        Returns:
            The global L2 norm of the gradient before clipping, and the learning rate that was used. After a norm that
            is not finite the parameters are worthless: stop without saving.
        """
        learning_rate = self.learning_rate
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        return float(grad_norm), learning_rate

    def resume_at(self, step: int) -> None:
        """Put the schedule where it stands after ``step`` updates."""
        self.scheduler.num_steps = step
        self.scheduler.step(increment=0)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])


def build_stepper(models: Sequence[torch.nn.Module], config: Config, device: Device, train_iters: int) -> Stepper:
    """Set up the optimizer over the wrapped chunks.

    Args:
        models: What :func:`wrap_for_training` returned.
        config: ``lr*``, ``adam_*``, ``weight_decay``, ``clip_grad``, ``use_distributed_optimizer``.
        device: gloo groups are asked for only where the device itself is not gloo.
        train_iters: Steps that the schedule decays over.
    """
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=config.bf16,
            params_dtype=torch.bfloat16 if config.bf16 else torch.float32,
            use_distributed_optimizer=config.use_distributed_optimizer,
        ),
        list(models),
        use_gloo_process_groups=not device.is_cpu,
    )
    steps = max(1, train_iters)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=min(math.floor(config.lr_warmup_fraction * steps), steps - 1),
        lr_decay_steps=steps,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
    return Stepper(optimizer, scheduler)
