"""What a batch of pairs can hold at its edges: filler pairs, extreme margins, certain and hopeless responses."""

import dataclasses
import math

import pytest
import torch

from mindspeed_simpo.config.options import TaskOptions
from mindspeed_simpo.loss.pair_loss import PairLoss
from mindspeed_simpo.losses import LossInputs, RunningStatistics
from mindspeed_simpo.objectives import OBJECTIVES
from mindspeed_simpo.objectives._functions import log1m_exp
from tests import objectives
from tests.pairs import floats, loss_of, pair_inputs

FORMS = objectives.OBJECTIVES


@pytest.mark.parametrize("stage", OBJECTIVES)
def test_supervised_term_divides_by_the_length_once(stage):
    # SFT of a 200-token answer at 1 nat per token costs 1, whatever its length
    long = pair_inputs([-200.0], [-3.0], [200], [2], ([-190.0], [-3.5]))
    without, with_sft = loss_of(stage)(long), loss_of(stage, 0.1)(long)
    assert (with_sft.loss - without.loss).tolist() == pytest.approx([0.1])
    assert with_sft.sft_loss.tolist() == [1.0]


def test_simpo_gradient_by_hand():
    # d loss / d s_w = -beta sigmoid(-beta z) / n_w, d loss / d s_l = +beta sigmoid(-beta z) / n_l
    chosen, rejected = torch.tensor([-4.0], requires_grad=True), torch.tensor([-3.0], requires_grad=True)
    inputs = LossInputs(chosen, rejected, torch.tensor([4]), torch.tensor([2]))
    loss_of(simpo_beta=2.0, gamma_beta_ratio=0.25)(inputs).loss.sum().backward()
    weight = 2.0 / (1 + math.exp(0.5))
    assert chosen.grad.item() == pytest.approx(-weight / 4)
    assert rejected.grad.item() == pytest.approx(weight / 2)


WITH_FILLERS = pair_inputs(
    [-9.0, -2.5, 0.0], [-8.0, -7.5, 0.0], [9, 2, 0], [5, 7, 0], ([-9.5, -3.0, 0.0], [-7.0, -7.0, 0.0])
)
SMOOTHED = {
    "simpo smoothed": {"simpo_label_smoothing": 0.3},
    "dpo smoothed": {"stage": "dpo", "dpo_label_smoothing": 0.3},
}
DPO_TYPES = {f"dpo {name}": {"stage": "dpo", "dpo_loss_type": name} for name in ("hinge", "ipo")}
MORE_FORMS = FORMS | SMOOTHED | DPO_TYPES


def _without_constants(name):
    """A margin that depends on the pair is a constant to autograd and not to finite differences: alpha is 0 there."""
    keys = MORE_FORMS[name]
    return keys | ({"alphadpo_alpha": 0.0} if keys.get("stage") == "alphadpo" else {})


@pytest.mark.parametrize("pref_ftx", [0.0, 0.7])
@pytest.mark.parametrize("name", MORE_FORMS)
def test_gradcheck_with_filler_pairs(name, pref_ftx):
    objective = PairLoss.of(TaskOptions(**_without_constants(name) | {"pref_ftx": pref_ftx}))

    def loss(chosen, rejected):
        return objective(dataclasses.replace(WITH_FILLERS, chosen_logprob=chosen, rejected_logprob=rejected)).loss

    sums = WITH_FILLERS.chosen_logprob.clone().requires_grad_(), WITH_FILLERS.rejected_logprob.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, sums)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", MORE_FORMS)
def test_filler_pairs_are_exactly_nothing(name, poison):
    chosen = torch.tensor([-5.0, 0.0, poison, -2.0], requires_grad=True)
    rejected = torch.tensor([-3.0, 0.0, -1.0, poison], requires_grad=True)
    inputs = LossInputs(
        chosen_logprob=chosen,
        rejected_logprob=rejected,
        chosen_tokens=torch.tensor([4, 0, 0, 2]),
        rejected_tokens=torch.tensor([2, 0, 1, 0]),
        reference_chosen_logprob=torch.tensor([-7.5, 0.0, poison, -1.0]),
        reference_rejected_logprob=torch.tensor([-1.5, 0.0, 0.0, poison]),
        running=RunningStatistics(torch.tensor(0.1), torch.tensor(0.2)),
    )
    out = PairLoss.of(TaskOptions(**MORE_FORMS[name] | {"pref_ftx": 0.5}))(inputs)
    out.loss.sum().backward()
    results = (out.loss, out.sft_loss, out.chosen_reward, out.rejected_reward, chosen.grad, rejected.grad)
    for values in (*results, *out.metrics.values()):
        assert values[0] != 0
        assert values[1:].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("stage", ["simpo", "dpo"])
def test_extreme_margins_neither_overflow_nor_vanish(stage):
    chosen, rejected = torch.tensor([-1e5, -1.0], requires_grad=True), torch.tensor([-1.0, -1e5], requires_grad=True)
    one = torch.ones(2, dtype=torch.int64)
    inputs = LossInputs(chosen, rejected, one, one, torch.zeros(2), torch.zeros(2))
    loss = loss_of(stage, **{f"{stage}_beta": 2.0})(inputs).loss
    loss.sum().backward()
    # a lost cause costs beta times its margin and pulls with slope beta; a won one costs nothing
    assert loss[0].item() == pytest.approx(2e5, rel=1e-4)
    assert loss[1].item() == 0.0
    assert chosen.grad.tolist() == [-2.0, 0.0]
    assert rejected.grad.tolist() == [2.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_certain_and_hopeless_responses_have_finite_gradients(form, dtype):
    # of one token: certain (rounded up, or by a hair not), or so unlikely that its probability is no fp32 number
    means = [0.0, 1e-9, -1e-30, -1e-6, -200.0, -1.0]
    chosen = floats([a for a in means for _ in means], dtype).requires_grad_()
    rejected = floats([b for _ in means for b in means], dtype).requires_grad_()
    one, zero = torch.ones(36, dtype=torch.int64), torch.zeros(36, dtype=dtype)
    running = RunningStatistics(floats(0.0), floats(0.0))
    out = PairLoss.of(TaskOptions(**FORMS[form]))(LossInputs(chosen, rejected, one, one, zero, zero, running))
    out.loss.sum().backward()
    assert out.loss.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_keep_the_type_and_only_the_loss_carries_a_gradient(form, dtype):
    inputs = pair_inputs([-4.0, 0.0], [-3.0, 0.0], [4, 0], [2, 0], ([-7.0, 0.0], [-1.0, 0.0]), dtype)
    inputs.chosen_logprob.requires_grad_()
    out = PairLoss.of(TaskOptions(**FORMS[form] | {"pref_ftx": 0.1}))(inputs)
    values = [out.loss, out.sft_loss, out.chosen_reward, out.rejected_reward, *out.metrics.values()]
    assert [tensor.dtype for tensor in values] == [dtype] * len(values)
    assert [tensor.requires_grad for tensor in values] == [True] + [False] * (len(values) - 1)
    assert out.metrics.keys() == OBJECTIVES[objectives.stage_of(form)].metrics.keys()


def test_values_near_their_limits_keep_their_digits():
    values = [-1e-300, -1e-15, -0.1, -0.6931, -0.6932, -5.0, -40.0, -700.0]
    exact = [math.log(-math.expm1(value)) if value > -0.7 else math.log1p(-math.exp(value)) for value in values]
    assert log1m_exp(floats(values)).tolist() == pytest.approx(exact, rel=1e-14)
    assert torch.autograd.gradcheck(log1m_exp, floats(values[2:6]).requires_grad_())
    rounded_up = floats([0.0, 1e-9]).requires_grad_()
    result = log1m_exp(rounded_up)
    result.sum().backward()
    assert result.isfinite().all()
    assert rounded_up.grad.tolist() == [0.0, 0.0]
