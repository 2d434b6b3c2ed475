"""The micro-batches of each step on each rank: a function of the seed and the number of consumed pairs alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int64

from mindspeed_simpo.batch import FILLER_PAIR, PairBatch, TokenizedPair
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.mixture import Mixture
from mindspeed_simpo.data.pixels import ImageInputs
from mindspeed_simpo.errors import DataError


@runtime_checkable
class Pairs(Protocol):
    """What a loader needs of a data set."""

    @property
    def lengths(self) -> Int[np.ndarray, "pair 3"]:
        """Tokens of prompt, chosen and rejected response of each pair."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> TokenizedPair: ...


class PairLoader:
    """One data-parallel rank's micro-batches of each global batch.

    The pairs form an endless stream, epoch after epoch, each epoch shuffled by a generator that ``(seed, epoch)``
    seeds. A global batch is the next ``global_batch_size`` pairs of the stream, or what is left of the epoch, filled up
    with filler pairs: every epoch has ``ceil(pairs / global_batch_size)`` steps and the pairs that ``mixture`` gives
    it, without one each of its pairs once. The pairs of a global batch depend neither on the number of ranks nor on
    ``batching``, which divides them over ranks and micro-batches; with ``padded``, micro-batch ``m`` of rank ``d``
    holds the pairs ``(m * data_parallel_size + d) * micro_batch_size`` and following. A loader has no state between
    steps: a resumed run needs ``consumed_pairs`` alone.

    Args:
        dataset: At least one pair.
        seed: Of the order; ``None`` keeps the order of the data set in every epoch.
        global_batch_size: Pairs of one optimizer step, over all ranks.
        batching: How the pairs of a global batch are divided over ranks and micro-batches.
        data_parallel_rank: This rank, from 0.
        data_parallel_size: Number of data-parallel ranks.
        images: Makes the inputs of images; ``None`` for a data set without images.
        mixture: Of the sources of the data set; ``None`` for all of its pairs.

    Raises:
        DataError: where the data set is empty.
        ValueError: where the global batch does not divide into micro-batches of all ranks, or the rank is out of range.
    """

    def __init__(
        self,
        dataset: Pairs,
        *,
        seed: int | None,
        global_batch_size: int,
        batching: Batching,
        data_parallel_rank: int,
        data_parallel_size: int,
        images: ImageInputs | None = None,
        mixture: Mixture | None = None,
    ) -> None:
        if not len(dataset):
            raise DataError("the dataset has no pair")
        size = batching.micro_batch_size
        if global_batch_size % (size * data_parallel_size):
            raise ValueError(f"{global_batch_size} pairs do not divide into {data_parallel_size} ranks x {size} pairs")
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(f"rank {data_parallel_rank} of {data_parallel_size}")
        self._dataset = dataset
        self._mixture = mixture or Mixture.of_all(len(dataset))
        self._stream = PairStream(self._mixture, seed)
        self.global_batch_size = global_batch_size
        self._batching = batching
        self._rank = data_parallel_rank
        self._ranks = data_parallel_size
        self._images = images

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of one epoch, the last of which may have fewer pairs."""
        return self._stream.steps_per_epoch(self.global_batch_size)

    def consumed_pairs(self, step: int) -> int:
        """Pairs of the stream that the first ``step`` global batches have."""
        return self._stream.consumed_pairs(step, self.global_batch_size)

    def num_pairs(self, consumed_pairs: int) -> int:
        """Pairs, without fillers, of the global batch that starts after ``consumed_pairs`` pairs of the stream."""
        return self._stream.left(consumed_pairs, self.global_batch_size)

    def train_step(self, consumed_pairs: int) -> list[PairBatch]:
        """This rank's micro-batches of the global batch that starts after ``consumed_pairs`` pairs of the stream."""
        return self._micro_batches(self._stream.take(consumed_pairs, self.global_batch_size))

    def eval_steps(self, max_global_batches: int | None = None) -> Iterator[list[PairBatch]]:
        """This rank's micro-batches of the first global batches of :meth:`eval_pairs`."""
        return self.steps_of(self.eval_pairs(max_global_batches))

    def eval_pairs(self, max_global_batches: int | None = None) -> Int64[np.ndarray, " pair"]:
        """Ascending indices of the pairs of the first epoch; with a limit its first ones, of several sources evenly."""
        pairs = self._stream.first_epoch
        if max_global_batches is None or max_global_batches * self.global_batch_size >= len(pairs):
            return pairs
        wanted = np.arange(max_global_batches * self.global_batch_size)
        if self._mixture.has_one_source:
            return pairs[wanted]
        return pairs[wanted * len(pairs) // len(wanted)]

    def train_pairs(self, first_step: int, last_step: int) -> Int64[np.ndarray, " pair"]:
        """Ascending indices of the distinct pairs of the global batches ``first_step`` to ``last_step - 1``."""
        return self._stream.between(self.consumed_pairs(first_step), self.consumed_pairs(last_step))

    def steps_of(self, pairs: Int64[np.ndarray, " pair"]) -> Iterator[list[PairBatch]]:
        """This rank's micro-batches of global batches of the given pairs, in their order.

        The last global batch is filled up with filler pairs, so that every rank has at least one micro-batch.
        """
        for start in range(0, len(pairs), self.global_batch_size):
            yield self._micro_batches(pairs[start : start + self.global_batch_size].tolist())

    def _micro_batches(self, pairs: Sequence[int]) -> list[PairBatch]:
        pair_ids = [*pairs, *[FILLER_PAIR] * (self.global_batch_size - len(pairs))]
        sizes = [
            0 if pair_id == FILLER_PAIR else self._batching.size_of(*self._dataset.lengths[pair_id].tolist())
            for pair_id in pair_ids
        ]
        dealt = self._batching.deal(sizes, self._ranks)
        own = [pair_ids[index] for index in dealt[self._rank]]
        return self._batching.micro_batches(
            [None if pair_id == FILLER_PAIR else self._dataset[pair_id] for pair_id in own],
            own,
            self._batching.number_of_micro_batches(sizes, dealt),
            self._images,
        )


class PairStream:
    """Indices of the pairs of a run in training order: epoch after epoch, each epoch shuffled by itself."""

    def __init__(self, mixture: Mixture, seed: int | None) -> None:
        self._mixture = mixture
        self._num_pairs = mixture.pairs
        self._seed = seed
        self._last_order: tuple[int, Int64[np.ndarray, " pair"]] | None = None

    @property
    def first_epoch(self) -> Int64[np.ndarray, " pair"]:
        """Ascending indices of the distinct pairs of the first epoch."""
        return self._mixture.distinct(self._seed, 0, 1)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches of one epoch; the last one has what is left."""
        return -(-self._num_pairs // batch_size)

    def consumed_pairs(self, step: int, batch_size: int) -> int:
        """Pairs of the first ``step`` batches."""
        epochs, steps = divmod(step, self.steps_per_epoch(batch_size))
        return epochs * self._num_pairs + steps * batch_size

    def left(self, consumed_pairs: int, batch_size: int) -> int:
        """Pairs of the batch after the first ``consumed_pairs``: ``batch_size``, or what is left of the epoch."""
        return min(batch_size, self._num_pairs - consumed_pairs % self._num_pairs)

    def take(self, consumed_pairs: int, batch_size: int) -> list[int]:
        """Indices of the pairs of the batch after the first ``consumed_pairs``."""
        epoch, start = divmod(consumed_pairs, self._num_pairs)
        taken: list[int] = self._order(epoch)[start : start + self.left(consumed_pairs, batch_size)].tolist()
        return taken

    def between(self, first: int, last: int) -> Int64[np.ndarray, " pair"]:
        """Ascending indices of the distinct pairs of the stream from place ``first`` to place ``last - 1``."""
        size = self._num_pairs
        taken = [np.arange(0)]
        if first < last and first % size:  # the rest of an epoch
            rest = min(last, first - first % size + size)
            taken.append(self._order(first // size)[first % size :][: rest - first])
            first = rest
        if last - first >= size:
            taken.append(self._mixture.distinct(self._seed, first // size, last // size))
            first = last - last % size
        if first < last:
            taken.append(self._order(first // size)[: last - first])
        return np.unique(np.concatenate(taken))

    def _order(self, epoch: int) -> Int64[np.ndarray, " pair"]:
        if self._last_order is None or self._last_order[0] != epoch:
            self._last_order = (epoch, self._mixture.epoch_order(self._seed, epoch))
        return self._last_order[1]


class PrefetchingLoader:
    """Prefetching around a loader: a thread builds the micro-batches of step ``n + 1`` while step ``n`` is computed.

    The micro-batches are those of :meth:`PairLoader.train_step`, a function of ``consumed_pairs``.
    """

    def __init__(self, loader: PairLoader) -> None:
        self._loader = loader
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="micro-batches")
        self._ahead: tuple[int, Future[list[PairBatch]]] | None = None

    def train_step(self, consumed_pairs: int) -> list[PairBatch]:
        """See :meth:`PairLoader.train_step`; an error in the thread is raised by the call for its step."""
        if self._ahead is not None and self._ahead[0] == consumed_pairs:
            micro_batches = self._ahead[1].result()
        else:
            micro_batches = self._thread.submit(self._loader.train_step, consumed_pairs).result()
        following = consumed_pairs + self._loader.num_pairs(consumed_pairs)
        self._ahead = (following, self._thread.submit(self._loader.train_step, following))
        return micro_batches
