"""The images of the pairs of a micro-batch as inputs of the vision tower, with the places of their features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from mindspeed_simpo.batch import TokenizedPair
from mindspeed_simpo.batch_images import BatchImages, PromptPositions, identities_of
from mindspeed_simpo.data.problems import ExampleError
from mindspeed_simpo.data.processor import ImageProcessor, inputs_of_images
from mindspeed_simpo.errors import DataError

Positions = Callable[[Mapping[str, Tensor]], Int[Tensor, "axis token"]]
"""``positions(inputs)``: rotary positions of a prompt, from what the processor gives for it."""
_BLANK_PIXELS = 64


@dataclass(frozen=True)
class ImageInputs:
    """Makes the inputs of images when a micro-batch is made."""

    processor: ImageProcessor
    positions: Positions | None
    """None where positions count the tokens of a sequence."""

    def of(self, pairs: Sequence[TokenizedPair | None], pair_ids: Sequence[int]) -> BatchImages:
        """The images of a micro-batch; a blank one, without a token, where its pairs have none.

        Args:
            pairs: Of the micro-batch; ``None`` is a filler pair.
            pair_ids: Index of each pair in the data set.

        Raises:
            DataError: naming the row whose images cannot be read, or are not those that it was tokenised with.
        """
        real = [(pair, number) for pair, number in zip(pairs, pair_ids, strict=True) if pair is not None]
        made = [(pair, number, self._of_pair(pair)) for pair, number in real if pair.images]
        if not made:
            return self.blank()
        tokens = [
            identities_of(number, 0, len(pair.prompt_ids))[torch.tensor(pair.prompt_ids) == self.processor.token_id]
            for pair, number, _ in made
        ]
        joined = {name: _joined([inputs[name] for _, _, inputs in made]) for name in made[0][2]}
        positions = None
        if self.positions is not None:
            found = {number: self._positions(pair, inputs) for pair, number, inputs in made}
            axes = len(next(iter(found.values())))
            plain = {number: torch.arange(len(pair.prompt_ids)).expand(axes, -1) for pair, number in real}
            every = plain | found
            positions = PromptPositions.of(list(every), list(every.values()))
        return BatchImages(joined, torch.cat(tokens), positions)

    def blank(self) -> BatchImages:
        """A small blank image, of which no token is in a text."""
        inputs, _ = self.processor.inputs([Image.new("RGB", (_BLANK_PIXELS, _BLANK_PIXELS))])
        return BatchImages(inputs, torch.zeros(0, dtype=torch.int64))

    def sample(self) -> tuple[Mapping[str, Tensor], BatchImages]:
        """A text with two images of noise: everything that the processor gives, and the images as a micro-batch's."""
        place, draw = self.processor.image_token, np.random.RandomState(0)
        noise = [draw.randint(256, size=(height, _BLANK_PIXELS, 3)).astype(np.uint8) for height in (64, 96)]
        encoded = self.processor.encode(f"a{place}b{place}c", [Image.fromarray(pixels) for pixels in noise])
        ids = encoded["input_ids"][0]
        tokens = identities_of(0, 0, len(ids))[ids == self.processor.token_id]
        positions = None if self.positions is None else PromptPositions.of([0], [self.positions(encoded)])
        return encoded, BatchImages(inputs_of_images(encoded), tokens, positions)

    def _of_pair(self, pair: TokenizedPair) -> dict[str, Tensor]:
        try:
            inputs, number = self.processor.inputs([image.open() for image in pair.images])
        except ExampleError as error:
            raise DataError(f"{pair.source}: {error}") from None
        tokens = pair.prompt_ids.count(self.processor.token_id)
        if number != tokens:
            raise DataError(
                f"{pair.source}: the images need {number} tokens, and the row was tokenised with {tokens}: the "
                "processor of the model has changed since"
            )
        return inputs

    def _positions(self, pair: TokenizedPair, inputs: Mapping[str, Tensor]) -> Int[Tensor, "axis token"]:
        assert self.positions is not None
        types = torch.tensor([self.processor.token_types(pair.prompt_ids)])
        return self.positions({"input_ids": torch.tensor([pair.prompt_ids]), "mm_token_type_ids": types, **inputs})


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors end to end along their first axis, the others padded with zeros, as image processors pad them."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [size - have for size, have in zip(shape, tensor.shape[1:], strict=True)]
        widths = [width for each in reversed(missing) for width in (0, each)]
        padded.append(torch.nn.functional.pad(tensor, widths) if any(missing) else tensor)
    return torch.cat(padded)
