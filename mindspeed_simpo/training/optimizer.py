"""megatron-core's DDP, (distributed) Adam and parameter scheduler, set up from the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config
from torch import Tensor

from mindspeed_simpo.config.options import ParallelOptions, TrainingOptions
from mindspeed_simpo.device import Device
from mindspeed_simpo.model.megatron.weights import unwrap
from mindspeed_simpo.training.learning_rate import learning_rate_schedule
from mindspeed_simpo.training.param_gather import gather_updated, overlap_with_forward


def wrap_for_training(
    models: Sequence[torch.nn.Module], parallel: ParallelOptions, *, bf16: bool
) -> list[torch.nn.Module]:
    """Wrap pipeline chunks in DDP, with gradients accumulated and reduced in fp32, and in ``Float16Module`` for bf16.

    Args:
        models: Pipeline chunks of this rank.
        parallel: ``overlap_grad_reduce``, ``overlap_param_gather`` and ``use_distributed_optimizer``.
        bf16: Whether parameters and activations are bf16.
    """
    wrapped = []
    for index, model in enumerate(wrap_precision(models, bf16=bf16)):
        transformer_config = get_model_config(model)
        transformer_config.finalize_model_grads_func = finalize_model_grads
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            # with virtual pipeline ranks the schedule starts the gathers, see param_gather
            align_param_gather=len(models) > 1,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
        )
        wrapped.append(DistributedDataParallel(transformer_config, ddp_config, model, disable_bucketing=index > 0))
    if parallel.overlap_grad_reduce:
        # the schedules overlap the reduction with the last backward only where they have a no_sync_func
        no_sync = [model.no_sync for model in wrapped]
        get_model_config(wrapped[0]).no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    if parallel.overlap_param_gather:
        overlap_with_forward(wrapped)
    return wrapped


def wrap_precision(models: Sequence[torch.nn.Module], *, bf16: bool) -> list[torch.nn.Module]:
    """Wrap pipeline chunks in ``Float16Module`` for bf16; sufficient for a forward without gradients."""
    if not bf16:
        return list(models)
    return [Float16Module(get_model_config(model), model) for model in models]


@dataclass(frozen=True)
class MegatronStepper:
    """Adam with clipping by the global gradient norm, and the learning-rate schedule; without host synchronisation."""

    models: Sequence[torch.nn.Module]
    """Pipeline chunks of this rank, wrapped in DDP."""
    optimizer: Any
    """The optimizer of megatron-core."""
    scheduler: OptimizerParamScheduler
    clip_grad: float
    """Maximum norm of the gradient; 0 disables clipping."""
    norm_dtype: torch.dtype
    """The dtype in which the clipping coefficient is computed."""
    norm_groups: tuple[tuple[bool, dist.ProcessGroup | None], ...]
    """Whether the parameters of experts are meant, and the ranks that hold the parts of such parameters' gradients;
    None for all ranks. Every rank has the same entries, whether it holds such parameters or not."""
    gathers_later: bool = False
    """Whether updated parameters are gathered over the data-parallel ranks while the next forward runs."""

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for model in self.models:
            model.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()

    @torch.no_grad()
    def squared_norm(self) -> Float[Tensor, " one"]:
        """The squared global L2 norm ``[1]`` of the reduced gradient, before clipping, on every rank; a collective.

        Call this method exactly once between the backward and :meth:`update`, because it copies the reduced gradients
        to the optimizer's parameters.
        """
        self.optimizer.prepare_grads()
        total = torch.zeros(1, device=torch.cuda.current_device())
        for of_experts, group in self.norm_groups:
            parts = [part for part in _parts(self.optimizer) if _is_of_experts(part) == of_experts]
            grads = [grad for part in parts for grad in part.get_main_grads_for_grad_norm()]
            norms = [torch.linalg.vector_norm(grad) for grad in grads]
            local_norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros_like(total)
            squared = local_norm.reshape(1).square()
            dist.all_reduce(squared, group=group)
            total += squared
        return total

    @torch.no_grad()
    def update(self, squared_norm: Float[Tensor, " one"]) -> float:
        """Clip the gradient to ``clip_grad``, update the parameters and advance the learning-rate schedule.

        Args:
            squared_norm: From :meth:`squared_norm`. The caller checks that the norm is finite; with a norm that is not,
                the parameters become NaN.

        Returns:
            The learning rate of this update.
        """
        learning_rate = self.learning_rate
        if self.clip_grad > 0:
            # the 1e-6 is megatron-core's and torch's guard against a zero norm
            coefficient = self.clip_grad / (squared_norm.to(self.norm_dtype).sqrt() + 1e-6)
            coefficient = coefficient.clamp(max=1.0).float().squeeze()
            for part in _parts(self.optimizer):
                grads = [parameter.grad for parameter in part.get_parameters() if parameter.grad is not None]
                if grads:
                    torch._foreach_mul_(grads, coefficient)
        self.optimizer.step_with_ready_grads()
        if self.gathers_later:
            gather_updated(self.models)
        self.scheduler.step(increment=1)
        return learning_rate

    def resume_schedule_at(self, step: int) -> None:
        """Set the learning-rate schedule to its state after ``step`` updates."""
        self.scheduler.num_steps = step
        self.scheduler.step(increment=0)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])


def _parts(optimizer: Any) -> list[Any]:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if not getattr(part, "is_stub_optimizer", False)]


def _is_of_experts(part: Any) -> bool:
    return any(group["is_expert_parallel"] for group in part.param_groups)


def _norm_groups(
    models: Sequence[torch.nn.Module], *, sharded: bool
) -> tuple[tuple[bool, dist.ProcessGroup | None], ...]:
    """See :attr:`MegatronStepper.norm_groups`."""
    dense = None if sharded else parallel_state.get_model_parallel_group()
    if not unwrap(models[0]).description.has_experts:
        return ((False, dense),)
    of_experts = dense if sharded else parallel_state.get_expert_tensor_model_pipeline_parallel_group()
    return (False, dense), (True, of_experts)


def build_stepper(
    models: Sequence[torch.nn.Module],
    training: TrainingOptions,
    parallel: ParallelOptions,
    device: Device,
    train_iters: int,
) -> MegatronStepper:
    """Set up the optimizer and the learning-rate schedule.

    Args:
        models: Wrapped pipeline chunks from :func:`wrap_for_training`.
        training: ``lr*``, ``adam_*``, ``weight_decay``, ``clip_grad``, ``bf16``.
        parallel: ``use_distributed_optimizer`` and ``overlap_param_gather``.
        device: The device of the models; additional gloo groups are used only where its backend is not gloo.
        train_iters: Steps over which the learning rate decays.
    """
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=training.lr,
            min_lr=training.min_lr,
            weight_decay=training.weight_decay,
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            adam_eps=training.adam_eps,
            clip_grad=training.clip_grad,
            bf16=training.bf16_in_use,
            params_dtype=torch.bfloat16 if training.bf16_in_use else torch.float32,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
        ),
        list(models),
        use_gloo_process_groups=not device.is_cpu,
    )
    scheduler = learning_rate_schedule(optimizer, training, train_iters)
    norm_groups = _norm_groups(models, sharded=parallel.use_distributed_optimizer)
    return MegatronStepper(
        models,
        optimizer,
        scheduler,
        training.clip_grad,
        device.reduction_dtype,
        norm_groups,
        gathers_later=parallel.overlap_param_gather,
    )
