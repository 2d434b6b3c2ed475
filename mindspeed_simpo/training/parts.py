"""The data of a session: its train and eval parts, and the loaders of micro-batches."""

from __future__ import annotations

from collections.abc import Callable

from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.dataset import PairDataset
from mindspeed_simpo.data.loader import PairLoader
from mindspeed_simpo.data.paths import Part
from mindspeed_simpo.data.pixels import ImageInputs
from mindspeed_simpo.data.processor import ImageProcessor
from mindspeed_simpo.data.together import decontaminate_together
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import fail_together
from mindspeed_simpo.training.backends import Backend


class Parts:
    """Prepares the parts of the data; the train part once, though the eval part may need it too.

    Args:
        prepare: Prepares a part; a collective.
        groups: Process groups of this rank.
        decontaminates: Whether held-out pairs whose prompt is that of a training pair are left out.
    """

    def __init__(self, prepare: Callable[..., PairDataset], groups: Groups, *, decontaminates: bool) -> None:
        self._prepare, self._groups, self._decontaminates = prepare, groups, decontaminates
        self._train: PairDataset | None = None

    def __call__(self, part: Part) -> PairDataset:
        """The train or eval part; a collective that raises on every rank or on none."""
        if part == "train":
            self._train = self._train or self._prepare(part="train")
            return self._train
        held_out = self._prepare(part="eval")
        if not self._decontaminates:
            return held_out
        return decontaminate_together(held_out, self("train"), self._groups.control)


class Loaders:
    """Makes the loaders of data sets; of one with images after a check that the model takes them, a collective.

    Args:
        backend: With a model.
        groups: Process groups of this rank.
        processor: Of a model that takes images.
    """

    def __init__(self, backend: Backend, groups: Groups, processor: ImageProcessor | None) -> None:
        self._backend, self._groups, self._processor = backend, groups, processor
        self._images: ImageInputs | None = None

    def __call__(self, data: PairDataset) -> PairLoader:
        """The loader of this rank's micro-batches of ``data``."""
        config = self._backend.config
        return PairLoader(
            data,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            batching=Batching.of(config),
            data_parallel_rank=self._groups.data.rank(),
            data_parallel_size=self._groups.data.size(),
            images=self._checked_images() if data.has_images else None,
            mixture=data.mixture,
        )

    def _checked_images(self) -> ImageInputs:
        if self._images is None:
            assert self._processor is not None, "without a processor, examples with images are refused"
            with fail_together(self._groups.control):
                images = ImageInputs(self._processor, self._backend.image_positions)
                self._backend.check_images(*images.sample())
            self._images = images
        return self._images
