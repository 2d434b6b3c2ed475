"""Micro-batches: padding and targets by hand, and the same pairs in the same global batches whatever the ranks."""

from __future__ import annotations

import threading
from itertools import chain

import numpy as np
import pytest
import torch

from mindspeed_simpo.batch import FILLER_PAIR, IGNORE_INDEX, TokenizedPair
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.collate import collate_padded
from mindspeed_simpo.data.loader import PairLoader, PrefetchingLoader
from mindspeed_simpo.errors import DataError

N = IGNORE_INDEX


def test_collate_by_hand():
    pairs = [TokenizedPair([5, 6], [7, 0, 9], [8], "a:1"), None, TokenizedPair([1], [2], [3, 4], "a:2")]
    batch = collate_padded(pairs, [11, 12, 13], multiple_of=2)
    pad = [0] * 6
    none = [N] * 6
    assert batch.tokens.tolist() == [
        [5, 6, 7, 0, 9, 0], pad, [1, 2, 0, 0, 0, 0], [5, 6, 8, 0, 0, 0], pad, [1, 3, 4, 0, 0, 0],
    ]  # fmt: skip
    assert batch.targets.tolist() == [
        [N, 7, 0, 9, N, N], none, [2, N, N, N, N, N], [N, 8, N, N, N, N], none, [3, 4, N, N, N, N],
    ]  # fmt: skip
    assert batch.lengths.tolist() == [5, 0, 2, 3, 0, 3]
    assert batch.pair_ids.tolist() == [11, FILLER_PAIR, 13]
    assert {part.dtype for part in (batch.tokens, batch.targets, batch.lengths, batch.pair_ids)} == {torch.int64}


def test_collate_is_as_wide_as_its_longest_row():
    pairs = [TokenizedPair([5] * 3, [7] * 4, [8], "a:1")]
    assert collate_padded(pairs, [0]).tokens.shape == (2, 7)
    assert collate_padded(pairs, [0], multiple_of=8).tokens.shape == (2, 8)
    assert collate_padded([None], [0], multiple_of=4).targets.tolist() == [[N] * 4] * 2
    with pytest.raises(ValueError, match="1 pairs and 2 ids"):
        collate_padded(pairs, [0, 1])


class Numbers:
    """Pairs that tell their own number."""

    def __init__(self, size):
        self.size = size
        self.lengths = np.tile([1, 1, 2], (size, 1))

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return TokenizedPair([1], [index + 2], [1, index + 2], f"{index}")


def loaders(size, ranks, micro, *, batch=8, seed=7):
    batching = Batching("padded", micro, max_tokens=0)
    shared = {"seed": seed, "global_batch_size": batch, "batching": batching, "data_parallel_size": ranks}
    return [PairLoader(Numbers(size), data_parallel_rank=rank, **shared) for rank in range(ranks)]


def global_batch(all_ranks):
    """Ids of a global batch in order: micro-batch by micro-batch, rank by rank."""
    rows = [batch for micro_batches in zip(*all_ranks, strict=True) for batch in micro_batches]
    for batch in rows:
        told = batch.tokens[batch.num_pairs :].amax(dim=1) - 2
        assert torch.where(batch.lengths[: batch.num_pairs] > 0, told, FILLER_PAIR).tolist() == batch.pair_ids.tolist()
    return [pair_id for batch in rows for pair_id in batch.pair_ids.tolist()]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 8), (2, 1), (2, 2), (4, 2), (8, 1), (2, 4)])
def test_global_batches_do_not_depend_on_the_ranks(ranks, micro):
    reference = loaders(21, 1, 8)[0]
    parts = loaders(21, ranks, micro)
    for consumed in (0, 8, 16, 24, 160):
        steps = [part.train_step(consumed) for part in parts]
        assert {len(step) for step in steps} == {8 // (ranks * micro)}
        assert global_batch(steps) == global_batch([reference.train_step(consumed)])


class Watched(Numbers):
    """Tells when pair 8 is read, and breaks at one."""

    def __init__(self, size, broken=None):
        super().__init__(size)
        self.broken = broken
        self.eighth_read = threading.Event()

    def __getitem__(self, index):
        if index == self.broken:
            raise DataError(f"pair {index} is broken")
        if index == 8:
            self.eighth_read.set()
        return super().__getitem__(index)


def prepared(dataset):
    batching = Batching("padded", 2, max_tokens=0)
    common = {"seed": None, "batching": batching, "data_parallel_rank": 0, "data_parallel_size": 1}
    return PrefetchingLoader(PairLoader(dataset, global_batch_size=4, **common))


def test_the_next_batch_is_prepared_while_this_one_is_trained_on():
    dataset = Watched(21)
    ahead = prepared(dataset)
    ahead.train_step(0)
    assert not dataset.eighth_read.is_set()
    first = ahead.train_step(4)
    assert dataset.eighth_read.wait(timeout=10), "nobody prepares the batch after it"
    for consumed, batches in ((4, first), (8, ahead.train_step(8)), (0, ahead.train_step(0)), (4, ahead.train_step(4))):
        ids = [pair_id for batch in batches for pair_id in batch.pair_ids.tolist()]
        assert ids == list(range(consumed, consumed + 4))


def test_a_pair_that_cannot_be_read_fails_the_step_that_needs_it():
    ahead = prepared(Watched(21, broken=9))
    assert ahead.train_step(4)
    with pytest.raises(DataError, match="pair 9"):
        ahead.train_step(8)


def stream_of(loader, steps):
    """Ids of each of the first global batches, without fillers."""
    batches = [global_batch([loader.train_step(loader.consumed_pairs(step))]) for step in range(steps)]
    return [[pair_id for pair_id in batch if pair_id != FILLER_PAIR] for batch in batches]


@pytest.mark.parametrize(("size", "sizes"), [(20, [8, 8, 4]), (16, [8, 8]), (3, [3]), (8, [8]), (9, [8, 1])])
def test_every_epoch_has_every_pair_once_in_an_order_of_its_own(size, sizes):
    loader = loaders(size, 1, 4)[0]
    steps = len(sizes)
    assert loader.steps_per_epoch == steps
    batches = stream_of(loader, 4 * steps)
    assert [len(batch) for batch in batches] == 4 * sizes
    assert [loader.num_pairs(loader.consumed_pairs(step)) for step in range(4 * steps)] == 4 * sizes
    assert [loader.consumed_pairs(step) for step in range(steps + 1)] == [
        sum(sizes[:step]) for step in range(steps + 1)
    ]
    epochs = [[*chain(*batches[start : start + steps])] for start in range(0, 4 * steps, steps)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(size))] * 4
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = loaders(size, 2, 1)[0]
    assert again.train_step(2 * size)[0].pair_ids.tolist() == epochs[2][:1]


@pytest.mark.parametrize("name", ["padded", "packed", "prefix_shared"])
def test_the_last_batch_of_an_epoch_is_filled_up_on_every_rank(name):
    shared = {"seed": 7, "global_batch_size": 8, "batching": Batching(name, 2, max_tokens=20), "data_parallel_size": 4}
    parts = [PairLoader(Numbers(9), data_parallel_rank=rank, **shared) for rank in range(4)]
    steps = [part.train_step(8) for part in parts]
    assert all(steps)
    ids = [pair_id for step in steps for batch in step for pair_id in batch.pair_ids.tolist()]
    assert [pair_id for pair_id in ids if pair_id != FILLER_PAIR] == stream_of(loaders(9, 1, 8)[0], 2)[1]


def test_the_order_follows_the_seed_and_is_the_same_for_ever():
    first, second = (global_batch([loaders(20, 1, 8, seed=seed)[0].train_step(0)]) for seed in (7, 8))
    assert first != second
    # a resumed run relies on these very numbers
    assert first == [16, 9, 14, 17, 7, 10, 15, 5]
    assert global_batch([loaders(20, 1, 8, seed=None)[0].train_step(16)]) == [16, 17, 18, 19] + [FILLER_PAIR] * 4


def test_the_batch_after_the_last_of_an_epoch_is_prepared():
    ahead = prepared(Watched(10))
    steps = [ahead.train_step(consumed) for consumed in (0, 4, 8, 10, 14)]
    ids = [[i for batch in step for i in batch.pair_ids.tolist()] for step in steps]
    assert ids == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, FILLER_PAIR, FILLER_PAIR], [0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (2, 2), (4, 1)])
def test_evaluation_is_one_pass_in_row_order_filled_up(ranks, micro):
    steps = list(zip(*(part.eval_steps(None) for part in loaders(11, ranks, micro)), strict=True))
    assert [global_batch(step) for step in steps] == [list(range(8)), [8, 9, 10] + [FILLER_PAIR] * 5]
    assert len({len(batches) for step in steps for batches in step}) == 1
    assert len(list(loaders(11, ranks, micro)[0].eval_steps(1))) == 1
    assert list(loaders(11, ranks, micro)[0].eval_steps(0)) == []


def test_what_cannot_be_loaded_is_refused():
    with pytest.raises(DataError, match="no pair"):
        loaders(0, 1, 1)
    with pytest.raises(ValueError, match="8 pairs do not divide into 3 ranks"):
        loaders(5, 3, 1)
