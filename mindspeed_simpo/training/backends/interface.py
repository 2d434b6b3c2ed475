"""What training asks of a backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mindspeed_simpo.batch_images import BatchImages
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.data.pixels import Positions
from mindspeed_simpo.loss.head import ResponseHead
from mindspeed_simpo.model.export_folder import Companions
from mindspeed_simpo.training.schedule.passes import Engine
from mindspeed_simpo.training.stepper import Stepper


@runtime_checkable
class Described(Protocol):
    """The part of a model's description that training reads."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def logit_softcap(self) -> float | None:
        """Soft cap of the logits; None for none."""

    @property
    def takes_images(self) -> bool:
        """Whether the model is of a class that takes images beside text."""


@runtime_checkable
class Backend(Protocol):
    """A model on this rank, and how it is run, updated and exported. All methods are collectives of the world."""

    @property
    def config(self) -> Config:
        """The configuration, with the defaults that depend on model and device."""

    @property
    def description(self) -> Described:
        """Description of the model."""

    @property
    def models(self) -> Sequence[torch.nn.Module]:
        """Parts of the model on this rank, without wrappers; none before :meth:`build`."""

    def build(self, *, starting_weights: bool) -> None:
        """Build ``models``.

        Args:
            starting_weights: Whether the model gets the weights that ``init_from`` selects; else a checkpoint must be
                loaded.
        """

    @property
    def image_positions(self) -> Positions | None:
        """Rotary positions of prompts with images; None where positions count tokens, or the model takes no images."""

    def check_images(self, encoded: Mapping[str, Tensor], images: BatchImages) -> None:
        """Check that the model takes images as this package gives them.

        Args:
            encoded: What the model's processor gives for a text with images.
            images: These images, of pair 0, whose prompt is the text.

        Raises:
            ModelError: where it does not.
        """

    def for_training(self) -> list[torch.nn.Module]:
        """``models``, wrapped for forward and backward."""

    def for_scoring(self) -> list[torch.nn.Module]:
        """``models``, wrapped for forwards without gradients."""

    def stepper(self, models: list[torch.nn.Module], train_iters: int) -> Stepper:
        """The optimizer of ``models``, which :meth:`for_training` returned."""

    def engine(self, models: list[torch.nn.Module], head: ResponseHead) -> Engine:
        """What runs ``models``, wrapped in one or the other way."""

    def without_adapters(self) -> AbstractContextManager[None]:
        """Compute ``models`` without their adapters inside of the context."""

    def difference_of(self, path: str) -> str | None:
        """The first setting of shape or arithmetic in which another model differs; None where equal."""

    def load_weights(self, path: str | None) -> None:
        """Load the weights of a model of the same shape, or with None the starting weights again."""

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(Hugging Face name, whole tensor)`` of the current weights, adapters merged, on global rank 0.

        It yields nothing on other ranks. Every rank must exhaust the iterator.
        """

    def export(
        self,
        output: Path,
        *,
        merge_adapters: bool,
        beside: Companions,
    ) -> None:
        """Write the current weights as a Hugging Face folder, or the adapters as a folder of peft.

        Args:
            output: Folder to write.
            merge_adapters: Whether adapters are merged into the weights.
            beside: The files beside the weights.
        """
