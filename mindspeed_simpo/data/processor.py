"""The processor of a model that takes images: text with image places to token ids, images to the model's inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import PIL
from PIL.Image import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from mindspeed_simpo.data.problems import first_line, malformed
from mindspeed_simpo.errors import ModelError

_OF_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})


class ImageProcessor:
    """The model's own processor, with the tokenizer of the run.

    Args:
        processor: Of transformers, with an image processor and a token that stands for an image in a text.
        name: Folder or hub id of the model.
        token_id: Id of the token that each feature of an image takes the place of, as the model has it.

    Raises:
        ModelError: where the processor has no such token.
    """

    def __init__(self, processor: ProcessorMixin, name: str, token_id: int) -> None:
        self._processor: Any = processor
        self._name = name
        self.token_id = token_id
        """Id of the token that each feature of an image takes the place of."""
        token = getattr(processor, "image_token", None)
        if not token or getattr(processor, "image_processor", None) is None:
            raise ModelError(f"{name}: {type(processor).__name__} has no token that stands for an image in a text")
        self.image_token = str(token)
        """The text of a place."""

    @property
    def chat_template(self) -> Any:
        """Of the processor; ``None`` where it has none."""
        return getattr(self._processor, "chat_template", None)

    def __reduce__(self) -> Any:
        # loaded anew in a worker process: the class of a processor without videos has no name to pickle it by
        return load_processor, (self._name,)

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the settings that token ids and inputs depend on."""
        facts = [self._processor.to_json_string(), self._processor.image_processor.to_json_string(), PIL.__version__]
        facts += [type(self._processor).__name__, type(self._processor.image_processor).__name__, self.image_token]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def encode(self, text: str, images: Sequence[Image]) -> Mapping[str, Tensor]:
        """Everything that the processor gives for a text, in which each image has a place, as tensors ``[1, ...]``.

        Raises:
            ExampleError: where the processor refuses the text or an image, such as one that is too narrow.
        """
        try:
            return dict(
                self._processor(
                    text=[text],
                    images=[list(images)],
                    add_special_tokens=False,
                    padding=False,
                    truncation=False,
                    return_tensors="pt",
                )
            )
        except Exception as error:
            raise malformed(f"the processor of the model refuses the images: {first_line(error)}") from None

    def prompt_ids(self, text: str, images: Sequence[Image]) -> list[int]:
        """Token ids of a rendered prompt, in which each place has become as many tokens as its image needs.

        Raises:
            ExampleError: see :meth:`encode`.
        """
        ids: list[int] = self.encode(text, images)["input_ids"][0].tolist()
        return ids

    def inputs(self, images: Sequence[Image]) -> tuple[dict[str, Tensor], int]:
        """What the model takes in for images, by its names, and the number of image tokens that they need.

        Raises:
            ExampleError: see :meth:`encode`.
        """
        encoded = self.encode(self.image_token * len(images), images)
        number = int((encoded["input_ids"] == self.token_id).sum())
        return inputs_of_images(encoded), number

    def token_types(self, ids: Sequence[int]) -> list[int]:
        """The kind of each token: 0 for text, 1 for images."""
        types: list[int] = self._processor.create_mm_token_type_ids([list(ids)])[0]
        return types


def inputs_of_images(encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of what a processor gives that belongs to images."""
    return {name: value for name, value in encoded.items() if name not in _OF_TEXT}


def load_processor(path_or_hub_id: str) -> ImageProcessor:
    """Load the processor of a model that takes images. Code in the model's folder is never run.

    Videos are not trained on: where only their part of the processor needs a library that is absent, the processor is
    made without that part.

    Raises:
        ModelError: where the model has no processor for images, or it needs a library that is absent.
    """
    try:
        config = AutoConfig.from_pretrained(path_or_hub_id, trust_remote_code=False)
        try:
            automatic: Any = AutoProcessor
            processor = automatic.from_pretrained(path_or_hub_id, trust_remote_code=False)
        except ImportError:
            processor = _without_videos(path_or_hub_id, config)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        advice = ": pip install 'mindspeed-simpo[images]'" if "torchvision" in reason.lower() else ""
        raise ModelError(f"{path_or_hub_id}: the processor of its images cannot be made: {reason}{advice}") from None
    if not isinstance(processor, ProcessorMixin):
        raise ModelError(f"{path_or_hub_id}: the model takes images, and its folder has no processor for them")
    token_id = getattr(config, "image_token_id", None)
    if token_id is None:
        raise ModelError(f"{path_or_hub_id}: config.json has no image_token_id: backend: fsdp needs it to place images")
    return ImageProcessor(processor, path_or_hub_id, int(token_id))


def _without_videos(path_or_hub_id: str, config: PreTrainedConfig) -> Any:
    kind: Any = PROCESSOR_MAPPING[type(config)]
    kept = [name for name in kind.get_attributes() if name != "video_processor"]
    changes = {"__module__": kind.__module__, "get_attributes": classmethod(lambda _: kept)}
    without: Any = type(kind.__name__, (kind,), changes)
    return without.from_pretrained(path_or_hub_id, trust_remote_code=False)
