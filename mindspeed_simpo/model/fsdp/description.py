"""A model of transformers before it has weights: what the configuration, the head and the sharding need of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from mindspeed_simpo.errors import ConfigError, ModelError
from mindspeed_simpo.model.folder import resolve_model
from mindspeed_simpo.model.fsdp.build import decoder_of, empty_model, layer_names, parameters_of_text, takes_images
from mindspeed_simpo.model.fsdp.logits import Logits, logits_of

_NOT_OF_SHAPE = frozenset(
    {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "architectures", "initializer_range", "use_cache"}
)
_LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True)
class TransformersModel:
    """The facts of a model class and its ``config.json``."""

    family: str
    """``model_type``."""
    architecture: str
    vocab_size: int
    layer_names: tuple[str, ...]
    """Of decoder and vision tower."""
    decoder_layers: tuple[str, ...]
    takes_images: bool
    logits: Logits
    parameters: int
    vision_parameters: int
    """Of vision tower and projection."""
    largest_layer: int
    """Parameters of the largest layer."""
    quantizable: int
    """Parameters of the linear layers, without the output layer, which ``quantization`` holds in 4 bits."""
    beside_layers: int
    """Parameters of the root: embedding, last norm and output layer."""
    settings: dict[str, Any] = dataclasses.field(hash=False)
    """What ``config.json`` says, with the defaults of transformers."""

    layers: tuple[()] = ()
    """Tensor parallelism, which needs the layers' sizes, is not offered."""

    @property
    def logit_softcap(self) -> float | None:
        """See :class:`~mindspeed_simpo.model.fsdp.logits.Logits`."""
        return self.logits.softcap

    def shares_prefixes(self, seq_length: int) -> bool:
        """Whether prompts may be shared, as far as the configuration says; the self-test decides."""
        return seq_length > 0

    def difference(self, other: TransformersModel) -> str | None:
        """The first setting of shape or arithmetic in which ``other`` differs, for messages; None where equal."""
        for name, ours in self.settings.items():
            theirs = other.settings.get(name)
            if name not in _NOT_OF_SHAPE and not name.endswith("_token_id") and ours != theirs:
                return f"{name} ({theirs}) than the trained model ({ours})"
        return None

    def check_freezing(self, freeze_vision: bool, *, adapted: bool) -> None:
        """Refuse to train a vision tower that is not there, or beside adapters.

        Args:
            freeze_vision: The option.
            adapted: Whether only adapters are trained.

        Raises:
            ConfigError: where ``freeze_vision`` is false all the same.
        """
        if freeze_vision:
            return
        if not self.takes_images:
            raise ConfigError(f"freeze_vision: false: {self.family} has no vision tower; remove the key")
        if adapted:
            raise ConfigError(
                "freeze_vision: false trains the weights of the vision tower, and with lora_r only adapters of the "
                "decoder are trained: remove one of the two"
            )

    def check_length(self, seq_length: int) -> None:
        """Refuse sequences whose rotary embedding depends on the other sequences of a batch.

        Raises:
            ModelError: where the rotary scaling depends on the length, beyond the length that it begins at.
        """
        rope = self.settings.get("rope_parameters") or {}
        kind = rope.get("rope_type")
        limit = rope.get("original_max_position_embeddings") or self.settings.get("max_position_embeddings")
        if kind in _LENGTH_DEPENDENT and limit is not None and seq_length > limit:
            raise ModelError(
                f"{self.family}: the rotary scaling {kind!r} of transformers depends on the longest sequence of a "
                f"batch beyond {limit} tokens: set seq_length ({seq_length}) to at most {limit}, or backend: megatron"
            )


def describe(model_name_or_path: str) -> TransformersModel:
    """Read the ``config.json`` of a model and build its class without weights. Code in the checkpoint is never run.

    Args:
        model_name_or_path: See :func:`~mindspeed_simpo.model.folder.resolve_model`.

    Raises:
        ModelError: where transformers does not know the model, or it computes its logits in an unknown way.
    """
    folder = resolve_model(model_name_or_path, weights=False)
    model = empty_model(folder)
    text = model.config.get_text_config()
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(
            f"{folder / 'config.json'}: the weights are quantized (quantization_config); use the unquantized checkpoint"
        )
    names = layer_names(model)
    decoder = set(decoder_of(model).modules())
    sizes = [sum(parameter.numel() for parameter in model.get_submodule(name).parameters()) for name in names]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call, unused-ignore]
    linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not output]
    return TransformersModel(
        family=model.config.model_type,
        architecture=type(model).__name__,
        vocab_size=text.vocab_size,
        layer_names=tuple(names),
        decoder_layers=tuple(name for name in names if model.get_submodule(name) in decoder),
        takes_images=takes_images(model.config),
        logits=logits_of(model),
        parameters=parameters,
        vision_parameters=parameters - sum(parameter.numel() for parameter in parameters_of_text(model)),
        largest_layer=max(sizes),
        quantizable=sum(layer.weight.numel() for layer in linear),
        beside_layers=parameters - sum(sizes),
        settings=model.config.to_dict(),
    )
