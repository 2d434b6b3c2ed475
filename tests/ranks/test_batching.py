"""Packed rows, with and without shared prompts, have the oracle's gradient at every layout, and the same metrics."""

import functools
import random

import pytest

from tests import oracle
from tests.hf import make_checkpoint
from tests.ranks.test_schedules import DP, PP, RECOMPUTE, SHARDED, TP, compare, engine_modes, sums_of

PACKED, SHARED = {"batching": "packed"}, {"batching": "prefix_shared"}
# several micro-batches, of which some hold one pair and some many
BUDGET = {"max_tokens_per_micro_batch": 90}
MODES = [
    PACKED | BUDGET,
    SHARED | BUDGET,
    SHARED | {"fused_logprob": True, "logprob_chunk_tokens": 7},
    PACKED | BUDGET | {"pair_schedule": "two_pass"},
]
SEQUENCE = {TP: 2, "sequence_parallel": True}
LAYOUTS = {
    "one rank": {},
    "tp2": {TP: 2},
    "tp2 sequence parallel": SEQUENCE,
    "pp2": {PP: 2},
    "dp2 sharded optimizer": {DP: 2, **SHARDED},
    "dp2 overlapped reduction": {DP: 2, "overlap_grad_reduce": True},
    "pp2 full recompute": {PP: 2, **RECOMPUTE},
    "selective recompute": {"recompute_granularity": "selective"},
}
VOCAB = 517


def drawn(*kinds):
    """Pairs of random ids by the lengths of prompt, chosen and rejected."""
    draw = random.Random(5)
    return [tuple([draw.randrange(VOCAB) for _ in range(length)] for length in kind) for kind in kinds]


@functools.cache
def pairs():
    return [
        *drawn((5, 9, 9), (6, 30, 2), (3, 2, 31), (40, 3, 5), (2, 20, 25), (7, 1, 1), (1, 1, 12), (0, 6, 4)),
        # id 0, and the ids at the boundaries of two shards, as the first tokens that the prompt's last one predicts
        ([11, 12], [0, 258, 259], [258, 0, 516]),
        ([0], [259], [0, 0]),
        # a prompt of several turns is a long prompt; the responses begin alike
        *drawn((64, 8, 8)),
        ([3, 4, 5], [9, 9, 9, 1], [9, 9, 9, 2]),
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    @functools.cache
    def make(tied, seed=0, family="qwen2"):
        folder = tmp_path_factory.mktemp("model")
        return make_checkpoint(folder, family, tied=tied, vocab_size=VOCAB, std=0.15, seed=seed)

    return make


@functools.cache
def expectation(folder, ref_folder=None):
    arguments = folder, pairs(), oracle.Options(stage="dpo" if ref_folder else "simpo"), ref_folder
    return oracle.evaluate(*arguments), oracle.gradients(*arguments)


def test_ranks_need_different_numbers_of_micro_batches():
    """Of the global batch above, under both packed forms: the layouts with two data-parallel ranks then have them."""
    from mindspeed_simpo.batch import TokenizedPair
    from mindspeed_simpo.data.batching import Batching

    for name in ("packed", "prefix_shared"):
        batching = Batching(name, 2, BUDGET["max_tokens_per_micro_batch"])
        own = [[TokenizedPair(*map(list, pair), source="") for pair in pairs()[rank::2]] for rank in (0, 1)]
        assert {len(batching.micro_batches(part, list(range(6)))) for part in own} == {2, 3}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_metrics_are_the_oracles(checkpoint, layout):
    folder = checkpoint(tied=layout != "pp2")
    compare(MODES, engine_modes(folder, MODES, pairs=pairs(), **LAYOUTS[layout]), *expectation(folder))


def test_dpo(checkpoint):
    folder, reference = checkpoint(tied=True), checkpoint(tied=True, seed=1)
    results = engine_modes(
        folder, MODES, sums_of(reference, pairs()), pairs=pairs(), stage="dpo", **SEQUENCE, **{DP: 2}
    )
    compare(MODES, results, *expectation(folder, reference))


def test_norms_of_queries_and_keys(checkpoint):
    folder = checkpoint(tied=False, family="qwen3")
    compare(MODES[:2], engine_modes(folder, MODES[:2], pairs=pairs(), **{TP: 2}), *expectation(folder))
