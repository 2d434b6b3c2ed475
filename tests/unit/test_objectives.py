"""Objectives against numbers worked out by hand, their own derivatives, and what a batch can hold at its edges."""

import dataclasses
import math

import pytest
import torch

from mindspeed_simpo.batch import LossInputs
from mindspeed_simpo.config.options import TaskOptions
from mindspeed_simpo.objectives import dpo, make_objective, simpo
from tests import oracle

LOSS_TYPES = ["sigmoid", "hinge", "ipo"]


def _inputs(chosen, rejected, chosen_tokens, rejected_tokens, references=None, dtype=torch.float64):
    def floats(values):
        return torch.tensor(values, dtype=dtype)

    return LossInputs(
        chosen_logprob=floats(chosen),
        rejected_logprob=floats(rejected),
        chosen_tokens=torch.tensor(chosen_tokens),
        rejected_tokens=torch.tensor(rejected_tokens),
        reference_chosen_logprob=floats(references[0]) if references else None,
        reference_rejected_logprob=floats(references[1]) if references else None,
    )


# m_w = -4/4 = -1, m_l = -3/2 = -1.5
PAIR = _inputs([-4.0], [-3.0], [4], [2])
# h = (-4 + 7) - (-3 + 1) = 5
PAIR_WITH_REFERENCE = _inputs([-4.0], [-3.0], [4], [2], ([-7.0], [-1.0]))


@pytest.mark.parametrize(
    ("loss_type", "smoothing", "expected"),
    # z = -1 + 1.5 - 0.25 = 0.25; beta z = 0.5; log(1 + exp(-0.5)) = 0.474077; 1 / (2 beta) = 0.25
    [
        ("sigmoid", 0.0, 0.4740769841801067),
        ("sigmoid", 0.1, 0.9 * 0.4740769841801067 + 0.1 * 0.9740769841801067),
        ("hinge", 0.0, 0.5),
        ("ipo", 0.0, 0.0),
    ],
)
def test_simpo_by_hand(loss_type, smoothing, expected):
    out = simpo(PAIR, beta=2.0, gamma_beta_ratio=0.25, loss_type=loss_type, label_smoothing=smoothing, pref_ftx=0.0)
    assert out.loss.tolist() == pytest.approx([expected], abs=1e-14)
    assert out.sft_loss.tolist() == [1.0]
    # rewards carry no margin
    assert (out.chosen_reward.tolist(), out.rejected_reward.tolist()) == ([-2.0], [-3.0])


def test_simpo_ipo_away_from_its_minimum_and_hinge_beyond_its_corner():
    # z = 0.5, so ipo is (0.5 - 1 / 8)^2 at beta 4, where beta z = 2 is beyond the hinge's corner
    assert simpo(PAIR, beta=4.0, gamma_beta_ratio=0.0, loss_type="ipo").loss.tolist() == [0.140625]
    assert simpo(PAIR, beta=4.0, gamma_beta_ratio=0.0, loss_type="hinge").loss.tolist() == [0.0]


@pytest.mark.parametrize(
    ("loss_type", "smoothing", "expected"),
    # beta h = 0.5; 1 / (2 beta) = 5
    [
        ("sigmoid", 0.0, 0.4740769841801067),
        ("sigmoid", 0.1, 0.9 * 0.4740769841801067 + 0.1 * 0.9740769841801067),
        ("hinge", 0.0, 0.5),
        ("ipo", 0.0, 0.0),
    ],
)
def test_dpo_by_hand(loss_type, smoothing, expected):
    out = dpo(PAIR_WITH_REFERENCE, beta=0.1, loss_type=loss_type, label_smoothing=smoothing, pref_ftx=0.0)
    assert out.loss.tolist() == pytest.approx([expected], abs=1e-14)
    assert out.sft_loss.tolist() == [1.0]
    assert out.chosen_reward.tolist() == pytest.approx([0.3])
    assert out.rejected_reward.tolist() == pytest.approx([-0.2])


def test_dpo_ipo_is_on_sums():
    # (h - 1 / (2 beta))^2 = (5 - 0.5)^2; on means it would be far smaller
    assert dpo(PAIR_WITH_REFERENCE, beta=1.0, loss_type="ipo").loss.tolist() == [20.25]


def test_dpo_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="reference"):
        dpo(PAIR)


def test_an_unknown_loss_type_is_refused():
    options = {"loss_type": "kto"}
    with pytest.raises(Exception, match="kto"):
        simpo(PAIR, **options)


@pytest.mark.parametrize("objective", [simpo, dpo])
def test_supervised_term_divides_by_the_length_once(objective):
    # SFT of a 200-token answer at 1 nat per token costs 1, whatever its length
    long = _inputs([-200.0], [-3.0], [200], [2], ([-190.0], [-3.5]))
    without, with_sft = objective(long, pref_ftx=0.0), objective(long, pref_ftx=0.1)
    assert (with_sft.loss - without.loss).tolist() == pytest.approx([0.1])
    assert with_sft.sft_loss.tolist() == [1.0]


def test_simpo_gradient_by_hand():
    # d loss / d s_w = -beta sigmoid(-beta z) / n_w, d loss / d s_l = +beta sigmoid(-beta z) / n_l
    chosen, rejected = torch.tensor([-4.0], requires_grad=True), torch.tensor([-3.0], requires_grad=True)
    inputs = LossInputs(chosen, rejected, torch.tensor([4]), torch.tensor([2]))
    simpo(inputs, beta=2.0, gamma_beta_ratio=0.25).loss.sum().backward()
    weight = 2.0 / (1 + math.exp(0.5))
    assert chosen.grad.item() == pytest.approx(-weight / 4)
    assert rejected.grad.item() == pytest.approx(weight / 2)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("pref_ftx", [0.0, 0.7])
@pytest.mark.parametrize("stage", ["simpo", "dpo"])
def test_gradcheck_with_a_filler_pair(loss_type, smoothing, pref_ftx, stage):
    options = TaskOptions(
        stage=stage,
        simpo_loss_type=loss_type,
        dpo_loss_type=loss_type,
        simpo_label_smoothing=smoothing if loss_type == "sigmoid" else 0.0,
        dpo_label_smoothing=smoothing if loss_type == "sigmoid" else 0.0,
        pref_ftx=pref_ftx,
    )
    base = _inputs([-9.0, -2.5, 0.0], [-8.0, -7.5, 0.0], [9, 2, 0], [5, 7, 0], ([-9.5, -3.0, 0.0], [-7.0, -7.0, 0.0]))

    def loss(chosen, rejected):
        inputs = dataclasses.replace(base, chosen_logprob=chosen, rejected_logprob=rejected)
        return make_objective(options)(inputs).loss

    sums = base.chosen_logprob.clone().requires_grad_(), base.rejected_logprob.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, sums)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("objective", [simpo, dpo])
def test_filler_pairs_are_exactly_nothing(objective, loss_type):
    poison = float("nan")
    chosen = torch.tensor([-4.0, 0.0, poison, -2.0], requires_grad=True)
    rejected = torch.tensor([-3.0, 0.0, -1.0, poison], requires_grad=True)
    inputs = LossInputs(
        chosen_logprob=chosen,
        rejected_logprob=rejected,
        chosen_tokens=torch.tensor([4, 0, 0, 2]),
        rejected_tokens=torch.tensor([2, 0, 1, 0]),
        reference_chosen_logprob=torch.tensor([-7.5, 0.0, poison, -1.0]),
        reference_rejected_logprob=torch.tensor([-1.0, 0.0, 0.0, poison]),
    )
    out = objective(inputs, loss_type=loss_type, pref_ftx=0.5)
    out.loss.sum().backward()
    for values in (out.loss, out.sft_loss, out.chosen_reward, out.rejected_reward, chosen.grad, rejected.grad):
        assert values[0] != 0
        assert values[1:].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("objective", [simpo, dpo])
def test_extreme_margins_neither_overflow_nor_vanish(objective):
    chosen, rejected = torch.tensor([-1e5, -1.0], requires_grad=True), torch.tensor([-1.0, -1e5], requires_grad=True)
    one = torch.ones(2, dtype=torch.int64)
    inputs = LossInputs(chosen, rejected, one, one, torch.zeros(2), torch.zeros(2))
    loss = objective(inputs, beta=2.0, label_smoothing=0.0).loss
    loss.sum().backward()
    # a lost cause costs beta times its margin and pulls with slope beta; a won one costs nothing
    assert loss[0].item() == pytest.approx(2e5, rel=1e-4)
    assert loss[1].item() == 0.0
    assert chosen.grad.tolist() == [-2.0, 0.0]
    assert rejected.grad.tolist() == [2.0, 0.0]


@pytest.mark.parametrize("objective", [simpo, dpo])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_keep_the_type_and_only_the_loss_carries_a_gradient(objective, dtype):
    inputs = _inputs([-4.0, 0.0], [-3.0, 0.0], [4, 0], [2, 0], ([-7.0, 0.0], [-1.0, 0.0]), dtype)
    inputs.chosen_logprob.requires_grad_()
    out = objective(inputs, label_smoothing=0.1, pref_ftx=0.1)
    fields = [getattr(out, field.name) for field in dataclasses.fields(out)]
    assert [field.dtype for field in fields] == [dtype] * 4
    assert [field.requires_grad for field in fields] == [True, False, False, False]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("stage", ["simpo", "dpo"])
def test_make_objective_binds_every_option_of_its_stage(loss_type, stage):
    smoothing = 0.15 if loss_type == "sigmoid" else 0.0
    values = {
        "stage": stage,
        "simpo_beta": 1.7,
        "gamma_beta_ratio": 0.4,
        "simpo_loss_type": loss_type if stage == "simpo" else "sigmoid",
        "simpo_label_smoothing": smoothing if stage == "simpo" else 0.0,
        "pref_ftx": 0.3,
        "dpo_beta": 0.2,
        "dpo_loss_type": loss_type if stage == "dpo" else "sigmoid",
        "dpo_label_smoothing": smoothing if stage == "dpo" else 0.0,
    }
    out = make_objective(TaskOptions(**values))(PAIR_WITH_REFERENCE)
    means = torch.tensor([-1.0, -1.5], dtype=torch.float64)
    ratios = torch.tensor([3.0, -2.0], dtype=torch.float64)
    dense = oracle.Options(**values)
    simpo_is_on = stage == "simpo"
    expected = oracle.simpo_loss(*means, dense) if simpo_is_on else oracle.dpo_loss(*ratios, means[0], dense)
    rewards = 1.7 * means if simpo_is_on else 0.2 * ratios
    assert out.loss.tolist() == pytest.approx([expected.item()], rel=1e-14)
    assert [out.chosen_reward.item(), out.rejected_reward.item()] == pytest.approx(rewards.tolist(), rel=1e-14)


def test_the_defaults_are_the_configuration_s():
    for stage, objective in (("simpo", simpo), ("dpo", dpo)):
        configured = make_objective(TaskOptions(stage=stage))(PAIR_WITH_REFERENCE)
        assert torch.equal(configured.loss, objective(PAIR_WITH_REFERENCE).loss)
