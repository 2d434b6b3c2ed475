"""Where the images of an example stand in its turns: in places that the turns name, or before the first question."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mindspeed_simpo.data.images import ImageReference
from mindspeed_simpo.data.problems import ExampleError, malformed
from mindspeed_simpo.data.turns import Message, PlacedImage

MARK = "<image>"
"""An image place in a text of an example that has images; in any other text it is text."""


def with_images(
    prompt: Sequence[Message],
    answers: Mapping[str, Sequence[Message]],
    images: Sequence[ImageReference],
    *,
    taken: bool,
) -> list[Message]:
    """The turns of a prompt with an image in each place.

    Places are the image parts of the turns, which may name their own image; else the marks ``<image>`` in their texts;
    else the start of the first user turn. Places without an image of their own take those of the column in order.

    Args:
        prompt: The turns before the answers.
        answers: Those of ``chosen`` and ``rejected``.
        images: Of the example's column.
        taken: Whether the model takes images.

    Raises:
        ExampleError: where the model takes none, an answer has an image, or images and places differ in number.
    """
    prompt = list(prompt)
    in_parts = any(message.images for message in prompt)
    in_answers = [name for name, turns in answers.items() if any(turn.images for turn in turns)]
    if not images and not in_parts and not in_answers:
        if taken and (marked := next((turn for turn in prompt if MARK in turn.content), None)):
            raise malformed(f"the {marked.role} turn has an image place {MARK}, and the row has no image")
        return prompt
    if not taken:
        raise malformed(
            "the row has images, and the model takes none: images need backend: fsdp and a model that transformers has "
            "for images and text"
        )
    if not in_parts:
        in_answers += [name for name, turns in answers.items() if any(MARK in turn.content for turn in turns)]
    if in_answers:
        raise malformed(f"{in_answers[0]}: an answer has an image: only prompts can have images")
    if not in_parts:
        prompt = _marked(prompt) if any(MARK in turn.content for turn in prompt) else _before_question(prompt, images)
    return _filled(prompt, images)


def _marked(prompt: Sequence[Message]) -> list[Message]:
    """The turns with places where their texts have marks."""
    return [_split(turn) for turn in prompt]


def _split(turn: Message) -> Message:
    pieces = turn.content.split(MARK)
    places, offset = [], 0
    for piece in pieces[:-1]:
        offset += len(piece)
        places.append(PlacedImage(offset))
    return dataclasses.replace(turn, content="".join(pieces), images=tuple(places))


def _before_question(prompt: Sequence[Message], images: Sequence[ImageReference]) -> list[Message]:
    first = next((index for index, turn in enumerate(prompt) if turn.role == "user"), None)
    if first is None:
        raise malformed("the row has images, and no user turn that they could stand in")
    places = tuple(PlacedImage(0) for _ in images)
    return [dataclasses.replace(turn, images=places) if index == first else turn for index, turn in enumerate(prompt)]


def _filled(prompt: Sequence[Message], images: Sequence[ImageReference]) -> list[Message]:
    empty = sum(place.image is None for turn in prompt for place in turn.images)
    if empty != len(images):
        raise ExampleError("malformed", f"{empty} image places and {len(images)} images: each image needs its place")
    left = iter(images)

    def filled(turn: Message) -> Message:
        places = (PlacedImage(place.offset, place.image or next(left)) for place in turn.images)
        return dataclasses.replace(turn, images=tuple(places))

    return [filled(turn) for turn in prompt]
