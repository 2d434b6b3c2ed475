"""Dropout of the inputs of peft's adapters, with the masks of the other backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mindspeed_simpo.model.dropout import InputDropout, feature_keys, mixed, projection_word


class ForwardTokens:
    """The keys of the tokens of the forward that runs now, see :func:`~mindspeed_simpo.model.dropout.token_keys`."""

    def __init__(self) -> None:
        self.keys: Int[Tensor, "row local"] | None = None
        """None drops nothing."""

    @contextmanager
    def at(self, keys: Int[Tensor, "row local"] | None) -> Iterator[None]:
        """Inside of the context, ``keys`` are those of the forward."""
        before, self.keys = self.keys, keys
        try:
            yield
        finally:
            self.keys = before

    def recomputed(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """``function(*inputs)``, which the backward computes again with the same keys."""
        keys = self.keys

        def again(*same: Any) -> Any:
            with self.at(keys):
                return function(*same)

        return checkpoint(again, *inputs, use_reentrant=False, preserve_rng_state=False)


class _MaskedInputs(torch.nn.Module):
    """``mask x / (1 - rate)`` for the input of one adapted projection."""

    def __init__(self, rate: float, name: str, features: int, tokens: ForwardTokens, device: torch.device) -> None:
        super().__init__()
        self._dropout = InputDropout(rate, feature_keys(torch.arange(features, device=device)))
        self._word, self._tokens = projection_word(name), tokens

    def forward(self, values: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        keys = self._tokens.keys
        if keys is None:
            return values
        return self._dropout.masked(values, mixed(keys.flatten() ^ self._word)) / (1 - self._dropout.rate)


def mask_inputs(adapted: PeftModel, rate: float, tokens: ForwardTokens) -> None:
    """Give every adapter the dropout of this package: its masks follow from the tokens, on every layout alike.

    Args:
        adapted: The model with its adapters.
        rate: Probability of a zero.
        tokens: Says which tokens a forward has.
    """
    causal: Any = adapted.base_model.model
    for path, layer in causal.named_modules():
        if isinstance(layer, LoraLayer):
            factor: Any = layer.lora_A["default"]
            dropout = _MaskedInputs(rate, path, factor.in_features, tokens, factor.weight.device)
            layer.lora_dropout["default"] = dropout
