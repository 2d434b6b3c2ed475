"""The gradient of a pair's loss by its two sums, and how the halves of a batch are cut."""

import pytest
import torch

from mindspeed_simpo.batch import IGNORE_INDEX, PairBatch, TokenizedPair, even_halves
from mindspeed_simpo.batch_images import NO_IDENTITY
from mindspeed_simpo.config.options import TaskOptions
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.loss.pair_loss import PairLoss
from mindspeed_simpo.losses import LossOutput
from tests.ranks.launcher import run_ranks

N = IGNORE_INDEX
simpo = PairLoss.of(TaskOptions())


def batch(*lengths, seq=12):
    tokens = torch.arange(len(lengths) * seq).view(len(lengths), seq) + 1
    targets = torch.full_like(tokens, IGNORE_INDEX)
    for row, length in enumerate(lengths):
        targets[row, : max(0, length - 1)] = tokens[row, 1 : max(1, length)]
    pairs = len(lengths) // 2
    return PairBatch(tokens, targets, torch.tensor(lengths), torch.arange(pairs), torch.full_like(tokens, NO_IDENTITY))


CHOSEN, REJECTED = torch.tensor([-3.0, -5.0], dtype=torch.float64), torch.tensor([-4.0, -1.0], dtype=torch.float64)


def _gradients_are_those_of_the_joint_loss():
    from mindspeed_simpo.loss.scoring import PairScorer

    leaves = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    pairs = batch(4, 5, 6, 7)
    scorer = PairScorer(simpo)
    loss, joint = scorer(pairs, *leaves)
    expected = torch.autograd.grad(loss, leaves)
    with torch.no_grad():
        *grads, scored = scorer.gradients(pairs, CHOSEN, REJECTED)
    torch.testing.assert_close(grads, list(expected), rtol=0, atol=0)
    torch.testing.assert_close(scored.output.loss, joint.output.loss, rtol=0, atol=0)
    assert not scored.inputs.chosen_logprob.requires_grad


def _an_objective_that_needs_more_than_the_sums_is_refused():
    from mindspeed_simpo.loss.scoring import PairScorer

    temperature = torch.ones((), dtype=torch.float64, requires_grad=True)

    def learned(inputs):
        output = simpo(inputs)
        return LossOutput(output.loss * temperature, output.sft_loss, output.chosen_reward, output.rejected_reward)

    with pytest.raises(ConfigError, match="pair_schedule: concat"):
        PairScorer(learned).gradients(batch(4, 5, 6, 7), CHOSEN, REJECTED)


def _an_objective_may_ignore_a_side():
    from mindspeed_simpo.loss.scoring import PairScorer

    def supervised(inputs):
        zero = torch.zeros_like(inputs.chosen_logprob)
        return LossOutput(-inputs.chosen_logprob, zero, zero, zero)

    chosen, rejected, _ = PairScorer(supervised).gradients(batch(4, 5, 6, 7), CHOSEN, REJECTED)
    assert chosen.tolist() == [-1.0, -1.0]
    assert rejected.tolist() == [0.0, 0.0]


def _halves_lose_the_padding_that_only_the_other_needs():
    from mindspeed_simpo.training.schedule.rows import Rows

    for lengths, multiple_of, expected in [
        ((4, 5, 12, 7), 1, (5, 12)),
        ((4, 5, 12, 7), 4, (8, 12)),
        ((3, 0, 9, 0), 2, (4, 10)),
        ((0, 0, 0, 0), 4, (4, 4)),
    ]:
        pairs = batch(*lengths)
        halves = [half.rows for half in Rows.of(pairs).two_pass_halves(pairs.lengths, multiple_of)]
        assert tuple(half.tokens.shape[1] for half in halves) == expected
        for half, first, last in zip(halves, (0, 2), (2, 4), strict=True):
            length = half.tokens.shape[1]
            assert torch.equal(half.tokens, pairs.tokens[first:last, :length])
            assert (half.targets != IGNORE_INDEX).sum() == (pairs.targets[first:last] != IGNORE_INDEX).sum()
            padded = half.padded_to(20)
            assert torch.equal(padded.tokens[:, :length], half.tokens)
            assert (padded.targets[:, length:] == IGNORE_INDEX).all()


def _halves_of_a_packed_row_are_rows_of_their_own():
    from mindspeed_simpo.batch import Documents
    from mindspeed_simpo.data.collate import collate_packed
    from mindspeed_simpo.training.schedule.rows import Rows

    pairs = [TokenizedPair([1, 2], [3], [4, 5, 6], ""), TokenizedPair([7], [8, 9], [10], "")]
    batch = collate_packed(pairs, [0, 1], multiple_of=4)
    halves = Rows.of(batch).two_pass_halves(batch.lengths, 4)
    assert [half.sequences.tolist() for half in halves] == [[0, 1], [2, 3]]
    chosen, rejected = (half.rows for half in halves)
    assert chosen.tokens.tolist() == [[1, 2, 3, 7, 8, 9, 0, 0]]
    assert chosen.targets.tolist() == [[N, 3, N, 8, 9, N, N, N]]
    assert chosen.packing.documents == Documents((3, 3, 2))
    assert chosen.packing.positions.tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert rejected.tokens.tolist() == [[1, 2, 4, 5, 6, 7, 10, 0]]
    assert rejected.targets.tolist() == [[N, 4, 5, 6, N, 10, N, N]]
    assert rejected.packing.documents == Documents((5, 2, 1))
    assert rejected.packing.pair_of.tolist() == [0] * 5 + [1] * 2 + [0]
    fillers = collate_packed([None], [0], multiple_of=4)
    for half in Rows.of(fillers).two_pass_halves(fillers.lengths, 4):
        assert half.rows.packing.documents == Documents((4,))
        assert half.rows.tokens.tolist() == [[0] * 4]


def _halves_of_a_packed_row_are_even():
    from mindspeed_simpo.data.collate import collate_packed
    from mindspeed_simpo.training.schedule.rows import Rows

    pairs = [TokenizedPair([1, 2], [3], [4, 5, 6], ""), TokenizedPair([7], [8], [9, 10], "")]
    batch = collate_packed(pairs, [0, 1])
    first, second = Rows.of(batch).two_pass_halves(batch.lengths, 1)
    assert (first.sequences.tolist(), second.sequences.tolist()) == ([0, 3], [2, 1])
    assert first.rows.tokens.tolist() == [[1, 2, 3, 7, 9, 10]]
    assert first.rows.targets.tolist() == [[N, 3, N, 9, 10, N]]
    assert second.rows.tokens.tolist() == [[1, 2, 4, 5, 6, 7, 8]]
    assert second.rows.targets.tolist() == [[N, 4, 5, 6, N, 8, N]]
    assert even_halves([9, 5, 1, 7], [1, 5, 4, 4]) == [0, 0, 0, 1]


@pytest.mark.parametrize(
    "case",
    [
        _gradients_are_those_of_the_joint_loss,
        _an_objective_that_needs_more_than_the_sums_is_refused,
        _an_objective_may_ignore_a_side,
        _halves_lose_the_padding_that_only_the_other_needs,
        _halves_of_a_packed_row_are_rows_of_their_own,
        _halves_of_a_packed_row_are_even,
    ],
    ids=lambda case: case.__name__.strip("_"),
)
def test_in_a_process_with_megatron(case):
    run_ranks(case, 1)
