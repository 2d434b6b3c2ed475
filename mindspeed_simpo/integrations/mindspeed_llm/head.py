"""``--fused-logprob``: upstream's output layer returns log-probability sums instead of logits."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from mindspeed_simpo.batch import ScoredTokens
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.loss.head import ResponseHead


class OutputLayerHead:
    """Replaces the forward of an output layer by a :class:`ResponseHead` with the layer's weight, for ``targets``.

    The layer itself remains in the model, so checkpoints, initialisation and tied weights are those of upstream.
    """

    def __init__(self, head: ResponseHead) -> None:
        self.targets: Int[Tensor, "row seq"] | None = None
        self._head = head

    def replace(self, output_layer: Any) -> None:
        """Replace ``output_layer.forward``.

        Raises:
            ConfigError: where the layer is not a ``ColumnParallelLinear`` without bias.
        """
        if type(output_layer).__name__ != "ColumnParallelLinear" or getattr(output_layer, "bias", None) is not None:
            raise ConfigError(f"--fused-logprob: the output layer is {type(output_layer).__name__}; remove the flag")

        def forward(
            hidden: Float[Tensor, "seq row hidden"], weight: Tensor | None = None, *_: Any, **__: Any
        ) -> tuple[Float[Tensor, "1 row"], None]:
            assert self.targets is not None
            weight = output_layer.weight if weight is None else weight
            sums = self._head(hidden, weight, ScoredTokens.of(self.targets))
            # the model then transposes the first two dimensions, as it does with logits
            return sums[None], None

        output_layer.forward = forward
