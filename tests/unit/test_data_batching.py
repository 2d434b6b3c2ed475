"""Packed rows by hand, and how micro-batches are filled."""

from __future__ import annotations

import random

import pytest
import torch

from mindspeed_simpo.batch import FILLER_PAIR, IGNORE_INDEX, Branch, Documents, TokenizedPair
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.data.batching import Batching, fill, spread
from mindspeed_simpo.data.collate import COLLATE, collate_packed, collate_padded, collate_prefix_shared
from mindspeed_simpo.data.loader import PairLoader
from mindspeed_simpo.errors import ConfigError
from tests.hf import Pairs

N = IGNORE_INDEX
PAIRS = [TokenizedPair([5, 6], [7, 0, 9], [8], "a:1"), None, TokenizedPair([1], [2], [3, 4], "a:2")]


def test_packed_by_hand():
    batch = collate_packed(PAIRS, [11, 12, 13], multiple_of=4)
    assert batch.tokens.tolist() == [[5, 6, 7, 0, 9, 1, 2, 5, 6, 8, 1, 3, 4, 0, 0, 0]]
    assert batch.targets.tolist() == [
        [N, 7, 0, 9, N, 2, N, N, N, N, N, N, N, N, N, N],
        [N, N, N, N, N, N, N, N, 8, N, 3, 4, N, N, N, N],
    ]
    assert batch.packing.documents == Documents((5, 2, 3, 3, 3))
    assert batch.packing.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert batch.packing.pair_of.tolist() == [0] * 5 + [1] * 2 + [0] * 3 + [1] * 3 + [0] * 3
    assert batch.pair_ids.tolist() == [11, 13]
    assert batch.lengths.tolist() == [5, 2, 3, 3]
    assert batch.response_tokens.tolist() == [3, 1, 1, 2]


def test_prefix_shared_by_hand():
    batch = collate_prefix_shared(PAIRS, [11, 12, 13], multiple_of=4)
    assert batch.tokens.tolist() == [[5, 6, 7, 0, 9, 1, 2, 0, 0, 8, 3, 4]]
    assert batch.targets.tolist() == [
        [N, 7, 0, 9, N, 2, N, N, N, N, N, N],
        [N, 8, N, N, N, 3, N, N, N, N, 4, N],
    ]
    assert batch.packing.documents == Documents((5, 2, 2), (Branch(0, 2, 1), Branch(5, 1, 2)))
    assert batch.packing.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 1, 2]
    assert batch.packing.pair_of.tolist() == [0] * 5 + [1] * 2 + [0] * 2 + [0, 1, 1]
    assert batch.lengths.tolist() == [5, 2, 3, 3]
    assert batch.response_tokens.tolist() == [3, 1, 1, 2]


@pytest.mark.parametrize("name", COLLATE)
def test_an_empty_prompt_leaves_the_first_token_unscored(name):
    batch = COLLATE[name]([TokenizedPair([], [4, 5, 6], [7, 8], ""), TokenizedPair([], [4], [5], "")], [0, 1])
    assert batch.response_tokens.tolist() == [2, 0, 1, 0]
    assert batch.targets[batch.targets != N].tolist() == [5, 6, 8]
    if name == "prefix_shared":
        assert batch.packing.documents == Documents((3, 1), (Branch(0, 0, 2), Branch(3, 0, 1)))
        assert batch.packing.positions.tolist() == [0, 1, 2, 0, 0, 1, 0]


@pytest.mark.parametrize("name", ["packed", "prefix_shared"])
def test_fillers_alone_make_a_row_of_padding(name):
    batch = COLLATE[name]([None, None], [FILLER_PAIR] * 2, multiple_of=2)
    assert batch.tokens.tolist() == [[0, 0]]
    assert batch.packing.documents == Documents((2,))
    assert batch.pair_ids.tolist() == [FILLER_PAIR]
    assert batch.response_tokens.tolist() == batch.lengths.tolist() == [0, 0]
    with pytest.raises(ValueError, match="0 pairs and 1 ids"):
        COLLATE[name]([], [0])


def test_every_form_scores_the_same_tokens_of_the_same_sequences():
    draw = random.Random(0)
    pairs = [
        TokenizedPair(*([draw.randrange(2, 99) for _ in range(draw.randint(1, 9))] for _ in range(3)), source="")
        for _ in range(7)
    ]
    ids = list(range(7))
    padded = collate_padded(pairs, ids)
    for collate in (collate_packed, collate_prefix_shared):
        batch = collate(pairs, ids, multiple_of=8).to(torch.device("cpu"))
        assert batch.response_tokens.tolist() == padded.response_tokens.tolist()
        assert batch.lengths.tolist() == padded.lengths.tolist()
        for side in (0, 1):
            for pair in ids:
                mine = batch.targets[side][(batch.packing.pair_of == pair) & (batch.targets[side] != N)]
                row = padded.targets[side * 7 + pair]
                assert mine.tolist() == row[row != N].tolist()


@pytest.mark.parametrize(
    ("sizes", "capacity", "expected"),
    [
        ([3, 5, 2, 5, 1], 8, [[0, 1], [2, 3, 4]]),
        ([4, 4, 4], 8, [[0, 1], [2]]),
        ([9, 1, 8], 8, [[0], [1], [2]]),
        ([0, 0, 0], 8, [[0, 1, 2]]),
        ([1], 0, [[0]]),
    ],
)
def test_fill_by_hand(sizes, capacity, expected):
    assert fill(sizes, capacity) == expected


def test_fill_loses_nothing_overfills_nothing_and_is_not_wasteful():
    draw = random.Random(0)
    for _ in range(200):
        sizes = [draw.randint(1, 60) for _ in range(draw.randint(1, 40))]
        bins = fill(sizes, 50)
        assert sorted(item for members in bins for item in members) == list(range(len(sizes)))
        assert all(len(members) == 1 or sum(sizes[item] for item in members) <= 50 for members in bins)
        assert sum(2 * sum(sizes[item] for item in members) <= 50 for members in bins) <= 1


@pytest.mark.parametrize(
    ("sizes", "bins", "expected"),
    [
        ([1, 9, 5, 4], 2, [[0, 1], [2, 3]]),
        ([3, 3, 3], 3, [[0], [1], [2]]),
        ([7, 0, 0, 0], 4, [[0], [1], [2], [3]]),
        ([0, 0, 0, 0], 2, [[0, 2], [1, 3]]),
    ],
)
def test_spread_by_hand(sizes, bins, expected):
    assert spread(sizes, bins) == expected


def test_spread_is_even_and_leaves_no_bin_empty():
    draw = random.Random(0)
    for _ in range(200):
        sizes = [draw.choice((0, draw.randint(1, 60))) for _ in range(draw.randint(8, 40))]
        bins = spread(sizes, 8)
        assert all(bins)
        assert sorted(item for members in bins for item in members) == list(range(len(sizes)))
        loads = [sum(sizes[item] for item in members) for members in bins]
        assert max(loads) - min(loads) <= max(sizes)


@pytest.mark.parametrize("name", COLLATE)
def test_all_ranks_together_have_every_pair_of_a_global_batch_once(name):
    draw = random.Random(1)
    pairs = Pairs(TokenizedPair([1] * draw.randint(1, 90), [2] * 3, [3], "") for _ in range(22))
    shared = {"seed": 3, "global_batch_size": 8, "batching": Batching(name, 2, 60), "data_parallel_size": 4}
    loaders = [PairLoader(pairs, data_parallel_rank=rank, **shared) for rank in range(4)]
    whole = PairLoader(pairs, data_parallel_rank=0, **shared | {"data_parallel_size": 1})
    for steps in (
        zip(*([loader.train_step(16)] for loader in [whole, *loaders]), strict=True),
        zip(*(loader.eval_steps() for loader in [whole, *loaders]), strict=True),
    ):
        for expected, *dealt in steps:
            assert all(dealt)
            found = sorted(i for part in dealt for batch in part for i in batch.pair_ids.tolist() if i != FILLER_PAIR)
            assert found == sorted(i for batch in expected for i in batch.pair_ids.tolist() if i != FILLER_PAIR)


def batching(name, **options):
    values = {"model_name_or_path": "m", "data_path": "d", "micro_batch_size": 2, "seq_length": 16, "batching": name}
    return Batching.of(Config(**(values | options)))


def test_the_budget_counts_the_tokens_that_the_model_sees():
    pair = TokenizedPair([1] * 5, [2] * 3, [3] * 4, "")
    assert batching("packed").size_of_pair(pair) == 17
    assert batching("prefix_shared").size_of_pair(pair) == 12
    assert batching("packed").max_tokens == batching("prefix_shared").max_tokens == 32
    for name, budget, expected in [
        ("packed", 34, [2, 2, 1]),
        ("packed", 33, [1] * 5),
        ("prefix_shared", 24, [2, 2, 1]),
        ("prefix_shared", 60, [5]),
        ("padded", None, [2, 2, 1]),
    ]:
        batches = batching(name, max_tokens_per_micro_batch=budget).micro_batches([pair] * 5, list(range(5)))
        assert [batch.num_pairs for batch in batches] == expected
        assert [i for batch in batches for i in batch.pair_ids.tolist()] == list(range(5))


def test_a_row_is_not_longer_than_the_budget_where_ranks_share_it():
    pairs = [TokenizedPair([1], [2], [3], "")] * 9
    sequence = {"sequence_parallel": True, "tensor_model_parallel_size": 4}
    batches = batching("prefix_shared", max_tokens_per_micro_batch=10, **sequence).micro_batches(pairs, list(range(9)))
    assert {batch.tokens.shape[1] for batch in batches} == {8, 4}


def test_a_budget_is_for_packed_rows():
    with pytest.raises(ValueError, match="max_tokens_per_micro_batch needs batching"):
        batching("padded", max_tokens_per_micro_batch=10)


VIRTUAL = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (
            {"batching": "packed", "context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"},
            "with context_parallel_algo: megatron_cp_algo",
        ),
        ({"batching": "packed", "pair_schedule": "split"}, "with pair_schedule: split"),
        ({"batching": "prefix_shared", "pair_schedule": "two_pass"}, "with pair_schedule: two_pass"),
    ],
)
def test_what_does_not_combine_is_refused(options, fragment):
    config = Config(model_name_or_path="m", data_path="d", **options)
    with pytest.raises(ConfigError, match=fragment):
        make_layout(config, 4)
    assert make_layout(Config(model_name_or_path="m", data_path="d", batching="packed", pair_schedule="two_pass"), 2)
