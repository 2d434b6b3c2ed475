"""What a pair schedule asks of the engine that runs a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.training.schedule.rows import Rows, RowShard

LossOfPass = Callable[[Float[Tensor, " sequence"]], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Pass:
    """A forward and, with gradients, a backward of some rows on all ranks that hold the model."""

    rows: Rows
    loss: LossOfPass
    """``loss(logprob_sums)`` -> scalar loss of the backward, and a record; called on the last pipeline rank."""
    sequence_weight: float = 0.0
    """Factor of the auxiliary loss of each sequence; 0 where it is off, and in passes without gradients."""

    def shards(self, groups: Groups, *, split: bool, dropout_key: int | None) -> list[RowShard]:
        """This context-parallel rank's inputs: of one forward, or with ``split`` of one for each half of the rows.

        Args:
            groups: Process groups of the layout.
            split: Whether the two halves of the rows are apart.
            dropout_key: Key of the step for the masks of dropout; None drops nothing.
        """
        context = groups.context
        parts = self.rows.halves() if split else (self.rows,)
        return [part.shard_of(context.rank(), context.size(), self.sequence_weight, dropout_key) for part in parts]


@runtime_checkable
class Engine(Protocol):
    """Runs a model on the rows of passes."""

    def run(self, passes: Sequence[Pass], *, split: bool, forward_only: bool, dropout_key: int | None) -> list[Any]:
        """Forward and, with gradients, backward of all passes; the gradients are then reduced over all ranks.

        The reduction takes the mean over the data-parallel ranks.

        Args:
            passes: Of one optimizer step.
            split: Whether the halves of the rows are two forwards with one backward.
            forward_only: Whether no gradient is wanted.
            dropout_key: Key of the step for the masks of dropout; None drops nothing.

        Returns:
            The records of the passes; empty except on the last pipeline rank.
        """

    def without_adapters(self) -> AbstractContextManager[None]:
        """Compute the model without its adapters inside of the context."""
