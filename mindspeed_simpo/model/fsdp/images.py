"""Features of images inside of the models of transformers, which put them in the places of image tokens themselves."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.fsdp.build import decoder_of

_FEATURES = "get_image_features"
_ENCODED = "mm_encoder_outputs"
_OF_TOWER = frozenset({"last_hidden_state", "hidden_states", "attentions"})
"""Fields of a tower's output that are no features of the decoder's tokens."""


def check_class(model: PreTrainedModel) -> None:
    """Check that a model takes features of images that are computed apart from its forward.

    Raises:
        ModelError: naming the class.
    """
    base = model.base_model
    takes = inspect.signature(base.forward).parameters.keys() if base is not model else ()
    if not hasattr(base, _FEATURES) or _ENCODED not in takes or decoder_of(model) is base:
        raise ModelError(
            f"{_class_name(model)} does not take the features of images apart from its forward: backend: fsdp trains "
            "it on text only"
        )


def rope_positions(base: Any, inputs: Mapping[str, Tensor]) -> Int[Tensor, "axis token"]:
    """Rotary positions of the tokens of a prompt, by the model's own ``get_rope_index``.

    Args:
        base: The base model; its weights are not read.
        inputs: What the processor gives for the prompt; what the method does not take is left out.
    """
    taken = inspect.signature(base.get_rope_index).parameters
    positions: Tensor = base.get_rope_index(**{name: value for name, value in inputs.items() if name in taken})[0]
    return positions[:, 0]


def encode(model: PreTrainedModel, inputs: Mapping[str, Tensor], *, frozen: bool) -> Any:
    """What the vision tower makes of images: the features in the output of the model's own ``get_image_features``.

    Args:
        model: The sharded model, inside of a forward of its root.
        inputs: What the image processor gives, on the device of the model; what the tower does not take is left out.
        frozen: Whether no gradient is wanted.
    """
    get_features = getattr(model.base_model, _FEATURES)
    taken = inspect.signature(get_features).parameters
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        output = get_features(**{name: value for name, value in inputs.items() if name in taken}, return_dict=True)
    return type(output)(**{name: value for name, value in output.items() if name not in _OF_TOWER})


def placed(
    model: PreTrainedModel, encoded: Any, number: int | None, index: Int[Tensor, " image_token"]
) -> dict[str, Any]:
    """The keyword by which the base model takes features: those of a row's image tokens, one for each token in order.

    Args:
        model: The model, for messages.
        encoded: From :func:`encode`.
        number: Number of features of all images; None for a blank image, of which no feature is used.
        index: Feature of each image token.

    Raises:
        ModelError: where the tower gives another number of features.
    """
    if number is None:
        number = _count(encoded.pooler_output)
    if (pooled := _taken(encoded.pooler_output, number, index)) is None:
        raise ModelError(
            f"{_class_name(model)} makes other features of the images of a micro-batch than its prompts have image "
            f"tokens, {number}: the processor does not belong to the model"
        )
    chosen = type(encoded)(pooler_output=pooled)
    for name, value in encoded.items():
        if name != "pooler_output":
            taken = _taken(value, number, index)
            chosen[name] = value if taken is None else taken
    return {_ENCODED: {"image": chosen}}


def _count(value: Any) -> int:
    parts = [value] if isinstance(value, Tensor) else value
    return sum(each.shape[:-1].numel() for each in parts)


def _taken(value: Any, number: int, index: Tensor) -> Any:
    """The indexed features of a tensor of all images, of tensors by image, or of each layer; None for anything else."""
    if isinstance(value, Tensor):
        return value.flatten(0, -2)[index] if value.dim() > 1 and value.shape[:-1].numel() == number else None
    if not isinstance(value, list | tuple) or not value:
        return None
    if all(isinstance(each, Tensor) and each.dim() > 1 for each in value):
        joined = torch.cat([each.flatten(0, -2) for each in value])
        if len(joined) == number:
            return [joined[index]]
    layers = [_taken(each, number, index) for each in value]
    return None if any(layer is None for layer in layers) else layers


def _class_name(model: PreTrainedModel) -> str:
    # FSDP2 puts its name before that of the class
    return type(model).__name__.removeprefix("FSDP")
