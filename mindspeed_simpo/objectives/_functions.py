"""Functions of tensors that several formulas share. Each imports torch when it is called, not when it is defined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

LossType = Literal["sigmoid", "hinge", "ipo"]


def log_sigmoid(values: Tensor) -> Tensor:
    """``log(1 / (1 + exp(-values)))``, elementwise, without overflow or cancellation for values of any size."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)


FLAT_LOGIT = 4.6
"""``-log sigmoid(x)`` has the gradient ``-sigmoid(-x)``, which is 1 % of its largest value at ``x = log(99)``."""


def flat_beyond(loss_type: LossType) -> float | None:
    """``beta * margin`` beyond which :func:`preference_loss` has 1 % of its largest gradient; None for ``ipo``."""
    return {"sigmoid": FLAT_LOGIT, "hinge": 1.0, "ipo": None}[loss_type]


def log1m_exp(values: Tensor) -> Tensor:
    """``log(1 - exp(values))`` of negative values, elementwise, without cancellation near 0 and far from 0.

    A value that rounding has made 0 or positive is replaced by the largest negative normal number and gets gradient 0,
    so the result is finite.
    """
    from math import log

    from torch import finfo

    values = values.clamp(max=-finfo(values.dtype).tiny)
    near = values > -log(2)
    # each branch gets a constant outside of its range: where() multiplies its gradient by 0, and 0 * inf is NaN
    return (-values.where(near, -1.0).expm1()).log().where(near, (-values.where(~near, -1.0).exp()).log1p())


def preference_loss(margin: Tensor, beta: float, loss_type: LossType, label_smoothing: float) -> Tensor:
    """The loss of each pair from the margin between chosen and rejected, with ``e = label_smoothing``.

    - ``sigmoid``: ``-(1 - e) * log sigmoid(beta * margin) - e * log sigmoid(-beta * margin)``
    - ``hinge``: ``max(0, 1 - beta * margin)``
    - ``ipo``: ``(margin - 1 / (2 * beta))**2``

    Args:
        margin: ``[pair]``, nats, or nats per token for length-normalised objectives.
        beta: Reward scale, per nat, > 0.
        loss_type: Form of the loss.
        label_smoothing: Probability that a preference label is wrong, in [0, 0.5); ``sigmoid`` only.

    Returns:
        ``[pair]``.
    """
    if loss_type == "sigmoid":
        loss = -(1 - label_smoothing) * log_sigmoid(beta * margin)
        return loss - label_smoothing * log_sigmoid(-beta * margin) if label_smoothing else loss
    if loss_type == "hinge":
        return (1 - beta * margin).relu()
    return (margin - 1 / (2 * beta)) ** 2
