"""A causal model of transformers as the trained model: token ids to log-probability sums of responses."""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel

from mindspeed_simpo.batch import Documents, to_device
from mindspeed_simpo.batch_images import BatchImages
from mindspeed_simpo.model.fsdp import images as vision
from mindspeed_simpo.model.fsdp.adapters import base_name
from mindspeed_simpo.model.fsdp.attention import RowsInAttention, Seen
from mindspeed_simpo.model.fsdp.dropout import ForwardTokens
from mindspeed_simpo.model.fsdp.logits import Logits

Head = Callable[[Tensor, Tensor], Tensor]
_SCORE = "score_of_this_package"
"""Name of the method that FSDP2 runs as a forward of the root."""
_OWN_FORWARD = "own_forward_of_base_model"
"""Name of the method that runs the base model without anything of this package."""


@dataclass(frozen=True)
class ImageTokens:
    """The images of a micro-batch, and the feature of each image token of its rows."""

    images: BatchImages
    index: Int[Tensor, " image_token"]
    """int64 index of the feature of each image token, row by row, on the device of the model."""


class Policy(torch.nn.Module):
    """The sharded model, called as the model of the megatron backend is.

    Args:
        causal: The sharded model.
        logits: What it computes between its last hidden states and its logits.
        context_group: Ranks that hold different positions of the rows; None where a rank holds whole rows.
        tokens: Told the keys of the tokens of each forward.
        adapted: The model as peft sees it; None without adapters.
        recomputes_core: Whether the attention's scores are computed again in the backward.
        vision_frozen: Whether the vision tower is not trained.
        keeps_features: Whether the features of a micro-batch's images are kept for its other forwards; only of a tower
            that is not trained.
    """

    def __init__(
        self,
        causal: PreTrainedModel,
        logits: Logits,
        context_group: dist.ProcessGroup | None,
        tokens: ForwardTokens,
        adapted: PeftModel | None = None,
        *,
        recomputes_core: bool,
        vision_frozen: bool = True,
        keeps_features: bool = False,
    ) -> None:
        super().__init__()
        self.causal, self.logits = causal, logits
        # not a submodule: it has the modules of causal
        self._adapted = [adapted]
        self._context_group, self._recomputes_core = context_group, recomputes_core
        self._tokens = tokens
        self._vision_frozen, self._keeps_features = vision_frozen, keeps_features and vision_frozen
        self._encoded: weakref.WeakKeyDictionary[BatchImages, Any] = weakref.WeakKeyDictionary()
        for name, method in ((_SCORE, _score), (_OWN_FORWARD, _own_forward)):
            setattr(causal, name, types.MethodType(method, causal))
            register_fsdp_forward_method(causal, name)

    def forward(
        self,
        tokens: Int[Tensor, "row seq"],
        *,
        position_ids: Int[Tensor, " seq"] | Int[Tensor, "axis row seq"],
        documents: Documents,
        head: Head,
        token_keys: Int[Tensor, "row seq"] | None = None,
        image_tokens: ImageTokens | None = None,
    ) -> Tensor:
        """``head(scale h, W)``, with the last hidden states ``h`` and the output weight ``W``.

        Args:
            tokens: This context-parallel rank's positions of the rows.
            position_ids: Position of each token in its sequence; on several axes where images are among the rows.
            documents: Attention pattern of the full row; empty for padded rows.
            head: See :class:`~mindspeed_simpo.loss.head.ResponseHead`.
            token_keys: Keys of the tokens for dropout; None without dropout.
            image_tokens: None where the data set has no images, on every rank.
        """
        core = self._recomputes_core and self.training
        rows = RowsInAttention(documents, self._context_group, recomputed=core)
        features = None if image_tokens is None else self._features(image_tokens)
        with self._tokens.at(token_keys):
            result: Tensor = getattr(self.causal, _SCORE)(tokens, position_ids, rows, head, self.logits.scale, features)
        return result

    def _features(self, image_tokens: ImageTokens) -> Callable[[], dict[str, Any]]:
        """The keyword with the features of the image tokens, as a function to be called in a forward of the root."""

        def features() -> dict[str, Any]:
            images = image_tokens.images
            encoded = self._encoded.get(images)
            if encoded is None:
                inputs = {name: to_device(value, image_tokens.index.device) for name, value in images.inputs.items()}
                encoded = vision.encode(self.causal, inputs, frozen=self._vision_frozen)
            if self._keeps_features:
                self._encoded[images] = encoded
            return vision.placed(self.causal, encoded, len(images.tokens) or None, image_tokens.index)

        return features

    def forget_images(self) -> None:
        """Compute all features anew, because the weights of the vision tower have changed."""
        self._encoded.clear()

    @torch.no_grad()
    def hidden_states(
        self,
        tokens: Int[Tensor, "row seq"],
        position_ids: Int[Tensor, " seq"] | Int[Tensor, "axis row seq"],
        documents: Documents,
        seen: Seen,
        image_tokens: ImageTokens | None = None,
    ) -> Float[Tensor, "row seq hidden"]:
        """The last hidden states of whole rows, the same on every rank, and what the model asked of its attention."""
        rows = RowsInAttention(documents, seen=seen)
        score = getattr(self.causal, _SCORE)
        features = None if image_tokens is None else self._features(image_tokens)
        result: Tensor = score(tokens, position_ids, rows, lambda hidden, _weight: hidden, 1.0, features)
        self.reshard()
        return result.transpose(0, 1)

    @torch.no_grad()
    def own_hidden_states(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "row seq hidden"]:
        """The last hidden states by everything of transformers, its attention included, the same on every rank.

        Args:
            inputs: What the model's processor gives; what its base model does not take is left out.
        """
        config: Any = self.causal.config.get_text_config()
        kept, config._attn_implementation_internal = config._attn_implementation_internal, "eager"
        try:
            states: Tensor = getattr(self.causal, _OWN_FORWARD)(inputs)
        finally:
            config._attn_implementation_internal = kept
        self.reshard()
        return states

    def reshard(self) -> None:
        """Free the root's own parameters, which FSDP2 keeps whole after a forward that no backward follows."""
        causal: Any = self.causal
        causal.reshard()

    @property
    def adapted(self) -> PeftModel | None:
        """The model as peft sees it; None without adapters."""
        return self._adapted[0]

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Compute the model without its adapters inside of the context."""
        if self.adapted is None:
            yield
            return
        with self.adapted.disable_adapter():
            yield

    def stored_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """What a checkpoint holds: the adapters' factors, by their names in peft, or all where there are none."""
        for name, parameter in self.causal.named_parameters():
            if self.adapted is None:
                yield name, parameter
            elif parameter.requires_grad:
                yield "base_model.model." + name.replace(".default", ""), parameter

    def weights(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The model's own parameters, without adapters, by their names in transformers."""
        for name, parameter in self.causal.named_parameters():
            if ".lora_" not in name:
                yield base_name(name), parameter


def _score(
    causal: PreTrainedModel,
    tokens: Tensor,
    position_ids: Tensor,
    rows: RowsInAttention,
    head: Head,
    scale: float,
    features: Callable[[], dict[str, Any]] | None,
) -> Tensor:
    """What a forward of the sharded root computes: here its own parameters are whole."""
    positions = position_ids[None] if position_ids.dim() == 1 else position_ids
    keywords = {} if features is None else features()
    outputs = causal.base_model(input_ids=tokens, position_ids=positions, use_cache=False, rows=rows, **keywords)
    hidden = outputs.last_hidden_state.transpose(0, 1)
    get_output: Any = causal.get_output_embeddings
    return head(hidden if scale == 1.0 else hidden * scale, get_output().weight)


def _own_forward(causal: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    taken = inspect.signature(causal.base_model.forward).parameters
    given = {name: value for name, value in inputs.items() if name in taken}
    outputs = causal.base_model(**given, use_cache=False)
    states: Tensor = outputs.last_hidden_state
    return states
