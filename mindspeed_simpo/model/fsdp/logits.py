"""What a model computes between its last hidden states and its logits, found out by giving it numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from mindspeed_simpo.errors import ModelError

_PROBES = (-300.0, -20.0, -3.0, -1.0, -0.01, 0.0, 0.01, 1.0, 3.0, 20.0, 300.0)


@dataclass(frozen=True)
class Logits:
    """``cap(scale W h)``, with ``cap(z) = softcap tanh(z / softcap)``, or ``z`` without a softcap."""

    scale: float = 1.0
    softcap: float | None = None

    def of(self, products: Tensor) -> Tensor:
        """The logits of the products ``W h``."""
        scaled = self.scale * products
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def logits_of(model: PreTrainedModel) -> Logits:
    """What ``model`` makes of the products of its output weight, checked at numbers of every size.

    Args:
        model: A causal model of transformers on the meta device.

    Raises:
        ModelError: where the output layer has a bias, or the logits are of another form than :class:`Logits`.
    """
    name = type(model).__name__
    get_output: Any = model.get_output_embeddings
    output = get_output()
    if output is None or not isinstance(output, torch.nn.Linear):
        raise ModelError(f"{name} has no linear output layer: it cannot be trained with backend: fsdp")
    if output.bias is not None:
        raise ModelError(f"{name} has a bias in its output layer, which backend: fsdp does not compute")
    probes = torch.tensor(_PROBES, dtype=torch.float64)
    found = _given(model, output, probes)
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    # the smallest probe is far below the cap
    small = _PROBES.index(0.01)
    scale = float(found[small]) / _PROBES[small] if softcap is None else 1.0
    logits = Logits(scale, softcap)
    if found.shape != probes.shape or not torch.allclose(logits.of(probes), found, rtol=1e-6, atol=1e-9):
        raise ModelError(
            f"{name} computes its logits in another way than cap(scale W h), which is all that backend: fsdp computes"
        )
    return logits


class _HiddenStates(BaseModelOutput):
    """The output of a base model, whose every other field is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _given(model: PreTrainedModel, output: torch.nn.Module, products: Tensor) -> Tensor:
    """The logits of the model where its output layer gives ``products``; its layers are not run."""
    base = model.base_model
    hidden = torch.zeros(1, 1, model.config.get_text_config().hidden_size, device="meta")

    def no_layers(*_args: Any, **_kwargs: Any) -> _HiddenStates:
        return _HiddenStates(last_hidden_state=hidden)

    hook = output.register_forward_hook(lambda *_: products[None, None])
    base.forward = no_layers
    try:
        logits: Tensor = model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device="meta")).logits
    finally:
        del base.forward
        hook.remove()
    return logits.flatten()
