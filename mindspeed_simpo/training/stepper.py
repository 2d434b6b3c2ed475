"""What training asks of an optimizer."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Stepper(Protocol):
    """An optimizer with clipping by the global gradient norm, and the learning-rate schedule."""

    @property
    def optimizer(self) -> Any:
        """The optimizer, whose state a checkpoint holds."""

    def zero_grad(self) -> None:
        """Set all gradients to zero."""

    def squared_norm(self) -> Float[Tensor, " one"]:
        """The squared global L2 norm ``[1]`` of the reduced gradient, before clipping, on every rank; a collective."""

    def update(self, squared_norm: Float[Tensor, " one"]) -> float:
        """Clip, update the parameters and advance the schedule; returns the learning rate of this update."""

    def resume_schedule_at(self, step: int) -> None:
        """Set the learning-rate schedule to its state after ``step`` updates."""
