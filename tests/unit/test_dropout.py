"""Masks of dropout: how many elements are dropped, what a mask depends on, and what it does not depend on."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from mindspeed_simpo.batch import TokenizedPair
from mindspeed_simpo.batch_images import identities_of
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.collate import COLLATE
from mindspeed_simpo.data.loader import PairLoader
from mindspeed_simpo.model.dropout import InputDropout, feature_keys, mixed, projection_word, step_key, token_keys
from mindspeed_simpo.training.schedule.rows import Rows

TOKENS, FEATURES = 600, 500


def kept(rate=0.25, *, seed=1, step=0, pair=3, part=1, projection="model.layers.0.mlp.up_proj", features=FEATURES):
    keys = mixed(token_keys(identities_of(pair, part, TOKENS), step_key(seed, step)) ^ projection_word(projection))
    dropout = InputDropout(rate, feature_keys(torch.arange(features)))
    return dropout.product(lambda rows, _: rows, torch.ones(TOKENS, features), torch.ones(1), keys).bool()


def test_a_mask_has_the_rate_and_no_structure():
    mask = kept().double()
    deviation = (0.25 * 0.75 / mask.numel()) ** 0.5
    assert abs(mask.mean() - 0.75) < 4 * deviation
    for axis, number in ((0, TOKENS), (1, FEATURES)):
        lines = mask.mean(axis)
        assert lines.std() == pytest.approx((0.25 * 0.75 / number) ** 0.5, rel=0.15)
        shifted = mask.roll(1, axis)
        assert abs(((mask - 0.75) * (shifted - 0.75)).mean()) < 4 * 0.25 * 0.75 / mask.numel() ** 0.5


OTHERS = (
    {"seed": 2},
    {"step": 1},
    {"pair": 4},
    {"pair": 3 + (1 << 31)},
    {"part": 2},
    {"part": 0},
    {"projection": "model.layers.1.mlp.up_proj"},
    {"projection": "model.layers.0.mlp.gate_proj"},
)


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations([{}, *OTHERS], 2)), ids=str)
def test_masks_of_different_things_are_independent(one, other):
    one, other = (kept(**values).double() - 0.75 for values in (one, other))
    assert abs((one * other).mean()) < 5 * 0.25 * 0.75 / one.numel() ** 0.5


def test_a_rate_drops_more_of_what_a_lower_rate_drops():
    assert not (kept(0.5) & ~kept(0.1)).any()
    assert kept(0.0).all()


def test_a_rank_has_the_masks_of_its_features():
    assert kept(features=100).equal(kept()[:, :100])


@pytest.mark.parametrize("bits", [1, 7, 16, 31])
def test_one_bit_of_the_input_turns_half_of_the_bits_of_the_hash(bits):
    words = torch.arange(20_000) * 104_729 & 0xFFFFFFFF
    turned = mixed(words) ^ mixed(words ^ 1 << bits)
    assert len(mixed(words).unique()) == len(words.unique())
    share = torch.stack([turned >> place & 1 for place in range(32)]).double().mean(1)
    assert share.min() > 0.4
    assert share.max() < 0.6


def test_the_gradient_is_that_of_the_masked_input():
    mask = kept(0.5, features=8)
    rows, factor = torch.randn(TOKENS, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    keys = token_keys(identities_of(3, 1, TOKENS), step_key(1, 0)) ^ projection_word("model.layers.0.mlp.up_proj")
    found = InputDropout(0.5, feature_keys(torch.arange(8))).product(linear, rows, factor, mixed(keys))
    expected = (rows * mask) @ factor.T
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(each, [rows, factor], upstream) for each in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_every_form_of_batches_has_the_tokens_of_a_pair():
    pairs = [
        TokenizedPair([1, 2, 3], [4, 5], [6], source=""),
        None,
        TokenizedPair([7], [8, 9, 10], [11, 12], source=""),
    ]
    ids = [40, -1, 41]
    parts = [(40, 3, 2, 1), (41, 1, 3, 2)]
    prompts, chosen, rejected = (
        torch.cat([identities_of(pair, part, lengths[part]) for pair, *lengths in parts]).tolist() for part in range(3)
    )
    for name, copies in (("padded", 2), ("packed", 2), ("prefix_shared", 1)):
        batch = COLLATE[name](pairs, ids, multiple_of=4)
        known = batch.identities[batch.identities >= 0]
        assert sorted(known.tolist()) == sorted(prompts * copies + chosen + rejected), name
        tokens = dict(zip(known.tolist(), batch.tokens[batch.identities >= 0].tolist(), strict=True))
        assert tokens[identities_of(41, 2, 2)[1].item()] == 12
        assert tokens[identities_of(40, 0, 3)[1].item()] == 2
        rows = Rows.of(batch)
        parts_of = rows.halves() if name == "padded" else ()
        if name == "packed":
            parts_of = [half.rows for half in rows.two_pass_halves(batch.lengths, 4)]
        halves = [each.identities[each.identities >= 0] for each in parts_of]
        assert not halves or torch.cat(halves).sort().values.equal(known.sort().values)
        shards = [rows.shard_of(rank, 2, dropout_key=5).token_keys for rank in range(2)]
        expected = token_keys(batch.identities, 5)
        assert torch.cat(shards, 1).flatten().sort().values.equal(expected.flatten().sort().values)
        assert rows.shard_of(0, 1).token_keys is None


def test_each_epoch_of_a_run_has_masks_of_its_own():
    class Five(list):
        lengths = np.array([[2, 1, 2]] * 5)

    batching = Batching("padded", micro_batch_size=1, max_tokens=0)
    pairs = Five(TokenizedPair([1, 2], [3], [4, 5], source="") for _ in range(5))
    loader = PairLoader(
        pairs, seed=1, global_batch_size=2, batching=batching, data_parallel_rank=0, data_parallel_size=1
    )
    seen: dict[int, list[int]] = {}
    for step in range(3 * loader.steps_per_epoch):
        for batch in loader.train_step(loader.consumed_pairs(step)):
            shard = Rows.of(batch).shard_of(0, 1, dropout_key=step_key(1, step))
            known = dict(zip(batch.identities.flatten().tolist(), shard.token_keys.flatten().tolist(), strict=True))
            for identity in known.keys() - {-1}:
                seen.setdefault(identity, []).append(known[identity])
    assert len(seen) == 5 * 5
    keys = list(itertools.chain.from_iterable(seen.values()))
    assert len(set(keys)) == len(keys) == 3 * len(seen)


@pytest.mark.parametrize("seed", [-1, 0, 1 << 31, 1 << 32])
def test_a_seed_that_is_no_word_of_the_hash_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        Config(model_name_or_path="m", data_path="d", lora_r=4, lora_dropout=0.1, seed=seed)
