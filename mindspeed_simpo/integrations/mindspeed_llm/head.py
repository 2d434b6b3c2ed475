"""Log-probabilities in the place of logits: upstream's output layer with ``--fused-logprob``."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from mindspeed_simpo.batch import ScoredTokens
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.loss.head import ResponseHead


class OutputLayerHead:
    """Scores ``targets`` with the weight of the output layer whose forward it replaces; logits are never stored.

    The layer stays where it is, so that checkpoints, initialisation and tied weights are upstream's.
    """

    def __init__(self, head: ResponseHead) -> None:
        self.targets: Int[Tensor, "row seq"] | None = None
        self._head = head

    def replace(self, output_layer: Any) -> None:
        """Take the place of ``output_layer.forward``.

        Raises:
            ConfigError: the layer is not the plain column-parallel one.
        """
        if type(output_layer).__name__ != "ColumnParallelLinear" or getattr(output_layer, "bias", None) is not None:
            raise ConfigError(f"--fused-logprob: the output layer is {type(output_layer).__name__}; remove the flag")

        def forward(
            hidden: Float[Tensor, "seq row hidden"], weight: Tensor | None = None, *_: Any, **__: Any
        ) -> tuple[Float[Tensor, "1 row"], None]:
            assert self.targets is not None
            weight = output_layer.weight if weight is None else weight
            sums = self._head(hidden, weight, ScoredTokens.of(self.targets))
            # the model goes on to swap the first two dimensions, as of logits
            return sums[None], None

        output_layer.forward = forward
