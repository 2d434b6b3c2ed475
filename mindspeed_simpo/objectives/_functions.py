"""Functions that tensors have no method for. Torch is imported when they are called, not when they are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

LossType = Literal["sigmoid", "hinge", "ipo"]


def log_sigmoid(values: Tensor) -> Tensor:
    """``log(1 / (1 + exp(-values)))``, elementwise, exact for values of any size."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)


def log1m_exp(values: Tensor) -> Tensor:
    """``log(1 - exp(values))`` of negative values, elementwise, exact near 0 and far from it.

    A value that rounding lifted to 0 or above counts as the largest negative number, and has no gradient: the result
    is finite.
    """
    from math import log

    from torch import finfo

    values = values.clamp(max=-finfo(values.dtype).tiny)
    near = values > -log(2)
    # each branch sees values that it is exact for: the other ones would give infinite gradients
    return (-values.where(near, -1.0).expm1()).log().where(near, (-values.where(~near, -1.0).exp()).log1p())


def preference_loss(margin: Tensor, beta: float, loss_type: LossType, label_smoothing: float) -> Tensor:
    """The loss of a margin between chosen and rejected.

    With ``e = label_smoothing``:

    - ``sigmoid``: ``-(1 - e) * log sigmoid(beta * margin) - e * log sigmoid(-beta * margin)``
    - ``hinge``: ``max(0, 1 - beta * margin)``
    - ``ipo``: ``(margin - 1 / (2 * beta))**2``

    Args:
        margin: ``Float[Tensor, "pair"]``, nats.
        beta: Reward scale, per nat, > 0.
        loss_type: Form of the loss.
        label_smoothing: Probability that a preference label is wrong, in [0, 0.5); ``sigmoid`` only.
    """
    if loss_type == "sigmoid":
        loss = -(1 - label_smoothing) * log_sigmoid(beta * margin)
        return loss - label_smoothing * log_sigmoid(-beta * margin) if label_smoothing else loss
    if loss_type == "hinge":
        return (1 - beta * margin).relu()
    return (margin - 1 / (2 * beta)) ** 2
