"""AdamW on the shards of each rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor

from mindspeed_simpo.config.options import TrainingOptions
from mindspeed_simpo.device import Device
from mindspeed_simpo.model.fsdp.policy import Policy
from mindspeed_simpo.training.learning_rate import learning_rate_schedule


@dataclass(frozen=True)
class ShardStepper:
    """AdamW with clipping by the global gradient norm, and the learning-rate schedule; without host synchronisation."""

    optimizer: torch.optim.AdamW
    scheduler: OptimizerParamScheduler
    clip_grad: float
    device: Device

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        self.optimizer.zero_grad()

    @torch.no_grad()
    def squared_norm(self) -> Float[Tensor, " one"]:
        """The squared global L2 norm ``[1]`` of the gradient, before clipping, on every rank; a collective."""
        sharded, whole = [], []
        group: dist.ProcessGroup | None = None
        for parameter in self._parameters():
            grad = parameter.grad
            if isinstance(grad, DTensor):
                sharded.append(grad.to_local())
                mesh = grad.device_mesh
                group = mesh.get_group(mesh.ndim - 1)
            elif grad is not None:
                whole.append(grad)
        total = self._squares(sharded)
        if group is not None:
            dist.all_reduce(total, group=group)
        return total + self._squares(whole)

    def _squares(self, grads: list[Tensor]) -> Float[Tensor, " one"]:
        if not grads:
            return torch.zeros(1, device=self.device.torch_device)
        norms = torch.stack([torch.linalg.vector_norm(grad) for grad in grads])
        total: Tensor = torch.linalg.vector_norm(norms).square().reshape(1)
        return total.to(self.device.torch_device)

    @torch.no_grad()
    def update(self, squared_norm: Float[Tensor, " one"]) -> float:
        """Clip the gradient to ``clip_grad``, update the parameters and advance the learning-rate schedule.

        Args:
            squared_norm: From :meth:`squared_norm`; the caller checks that it is finite.

        Returns:
            The learning rate of this update.
        """
        learning_rate = self.learning_rate
        if self.clip_grad > 0:
            # the 1e-6 is megatron-core's and torch's guard against a zero norm
            coefficient = self.clip_grad / (squared_norm.to(self.device.reduction_dtype).sqrt() + 1e-6)
            coefficient = coefficient.clamp(max=1.0).float().squeeze()
            for parameter in self._parameters():
                grad = parameter.grad
                if grad is not None:
                    local = grad.to_local() if isinstance(grad, DTensor) else grad
                    local.mul_(coefficient.to(local.device))
        self.optimizer.step()
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

    def _parameters(self) -> Iterable[Tensor]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])


def build_shard_stepper(policy: Policy, training: TrainingOptions, device: Device, train_iters: int) -> ShardStepper:
    """Set up AdamW and the learning-rate schedule; no weight decay of vectors, as in megatron-core.

    Args:
        policy: The sharded model.
        training: ``lr*``, ``adam_*``, ``weight_decay``, ``clip_grad``.
        device: The device of the model.
        train_iters: Steps over which the learning rate decays.
    """
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() <= 1]
    groups = [{"params": matrices, "wd_mult": 1.0}, {"params": vectors, "wd_mult": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.lr,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_eps,
        weight_decay=training.weight_decay,
    )
    schedule = learning_rate_schedule(optimizer, training, train_iters)
    return ShardStepper(optimizer, schedule, training.clip_grad, device)
