"""Objectives against numbers worked out by hand, their own derivatives, and what a batch can hold at its edges."""

import dataclasses
import math
from typing import get_args

import pytest
import torch

from mindspeed_simpo.batch import LossInputs, RunningStatistics
from mindspeed_simpo.config.options import TaskOptions
from mindspeed_simpo.loss.pair_loss import PairLoss
from mindspeed_simpo.objectives import OBJECTIVES
from tests import objectives, oracle_objectives

FORMS = objectives.OBJECTIVES
LOSS_TYPES = ["sigmoid", "hinge", "ipo"]


def _floats(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def _inputs(
    chosen,
    rejected,
    chosen_tokens,
    rejected_tokens,
    references=None,
    dtype=torch.float64,
    running=objectives.STATISTICS,
):
    return LossInputs(
        chosen_logprob=_floats(chosen, dtype),
        rejected_logprob=_floats(rejected, dtype),
        chosen_tokens=torch.tensor(chosen_tokens),
        rejected_tokens=torch.tensor(rejected_tokens),
        reference_chosen_logprob=_floats(references[0], dtype) if references else None,
        reference_rejected_logprob=_floats(references[1], dtype) if references else None,
        running=RunningStatistics(*map(_floats, running)) if running else None,
    )


def loss_of(stage="simpo", pref_ftx=0.0, **keys):
    return PairLoss(OBJECTIVES[stage], OBJECTIVES[stage].keys(**keys), pref_ftx)


# means -1 and -1.5; reference means -1.75 and -0.5
PAIR = _inputs([-4.0], [-3.0], [4], [2], ([-7.0], [-1.0]))
LOG_SIGMOID = {-0.5: -0.9740769841801067, 0.5: -0.4740769841801067}

BY_HAND = [
    # beta z = 2 (0.5 - 0.25)
    ({"simpo_beta": 2.0, "gamma_beta_ratio": 0.25}, -LOG_SIGMOID[0.5], (-2.0, -3.0)),
    (
        {"simpo_beta": 2.0, "gamma_beta_ratio": 0.25, "simpo_label_smoothing": 0.1},
        -0.9 * LOG_SIGMOID[0.5] - 0.1 * LOG_SIGMOID[-0.5],
        (-2.0, -3.0),
    ),
    ({"simpo_beta": 2.0, "gamma_beta_ratio": 0.25, "simpo_loss_type": "hinge"}, 0.5, (-2.0, -3.0)),
    ({"simpo_beta": 2.0, "gamma_beta_ratio": 0.25, "simpo_loss_type": "ipo"}, 0.0, (-2.0, -3.0)),
    # (0.5 - 1 / 8)^2, and beta z = 2 is beyond the hinge's corner
    ({"simpo_beta": 4.0, "gamma_beta_ratio": 0.0, "simpo_loss_type": "ipo"}, 0.140625, (-4.0, -6.0)),
    ({"simpo_beta": 4.0, "gamma_beta_ratio": 0.0, "simpo_loss_type": "hinge"}, 0.0, (-4.0, -6.0)),
    # 0.25 (-4 + 3 - 1)
    (
        {"simpo_beta": 0.25, "gamma_beta_ratio": 1.0, "simpo_length_norm": False},
        0.5 - LOG_SIGMOID[0.5],
        (-1.0, -0.75),
    ),
    # h = (-4 + 7) - (-3 + 1) = 5
    ({"stage": "dpo", "dpo_beta": 0.1}, -LOG_SIGMOID[0.5], (0.3, -0.2)),
    (
        {"stage": "dpo", "dpo_beta": 0.1, "dpo_label_smoothing": 0.1},
        -0.9 * LOG_SIGMOID[0.5] - 0.1 * LOG_SIGMOID[-0.5],
        (0.3, -0.2),
    ),
    ({"stage": "dpo", "dpo_beta": 0.1, "dpo_loss_type": "hinge"}, 0.5, (0.3, -0.2)),
    # on sums: (5 - 0.5)^2; on means it would be far smaller
    ({"stage": "dpo", "dpo_beta": 1.0, "dpo_loss_type": "ipo"}, 20.25, (3.0, -2.0)),
    # h = 0.75 - (-1) = 1.75
    ({"stage": "dpo", "dpo_beta": 2 / 7, "dpo_length_norm": True}, -LOG_SIGMOID[0.5], (0.75 * 2 / 7, -2 / 7)),
    # odds 1 / (e - 1) and 1 / (e^1.5 - 1): sigmoid of the log ratio is (e^1.5 - 1) / (e^1.5 + e - 2)
    (
        {"stage": "orpo", "orpo_lambda": 0.5},
        1 - 0.5 * math.log((math.exp(1.5) - 1) / (math.exp(1.5) + math.e - 2)),
        (-0.5, -0.75),
    ),
    # beta (-4 + 3) = -0.5; the supervised term is 0.2 nats per token
    ({"stage": "cpo", "cpo_beta": 0.5, "cpo_alpha": 0.2}, -LOG_SIGMOID[-0.5] + 0.2, (-2.0, -1.5)),
    ({"stage": "simper"}, math.exp(-1.5) - math.exp(-1), (math.exp(-1), math.exp(-1.5))),
    # rho = 1 - exp(-m)
    (
        {"stage": "alphapo", "alphapo_alpha": 1.0, "alphapo_beta": 0.5, "alphapo_gamma_beta_ratio": 1.0},
        math.log(1 + math.exp(0.5 * (1 + math.e - math.exp(1.5)))),
        (0.5 * (1 - math.e), 0.5 * (1 - math.exp(1.5))),
    ),
    # 2 (0.5 - 0.2 (-1.25) - 0.8 0.625) = 0.5
    (
        {
            "stage": "rainbowpo",
            "rainbowpo_beta": 2.0,
            "rainbowpo_reference_mix": 0.2,
            "rainbowpo_gamma_beta_ratio": 0.625,
        },
        -LOG_SIGMOID[0.5],
        (2 * (-1 + 0.35), 2 * (-1.5 + 0.1)),
    ),
    # 0.75 - 0.5
    ({"stage": "repo", "repo_margin": 0.75}, 0.25, (-1.0, -1.5)),
    # z = (1.75 - 0.15) / 0.4 = 4; 2 (0.5 - 0.05 - 0.05 z) = 0.5
    (
        {"stage": "alphadpo", "alphadpo_beta": 2.0, "alphadpo_alpha": 0.05, "alphadpo_gamma_beta_ratio": 0.05},
        -LOG_SIGMOID[0.5],
        (2 * (-1 - 0.05 * 0.75), 2 * (-1.5 + 0.05 * 1.0)),
    ),
]


def test_every_stage_has_its_lines():
    stages = set(OBJECTIVES)
    assert {objectives.stage_of(form) for form in FORMS} == stages
    assert {keys.get("stage", "simpo") for keys, *_ in BY_HAND} == stages
    assert set(oracle_objectives.STAGES) == stages
    for stage, objective in OBJECTIVES.items():
        assert oracle_objectives.STAGES[stage].needs_reference == objective.needs_reference
        assert oracle_objectives.STAGES[stage].tracks_gap == (objective.tracked is not None)
        assert objective.source
        assert all(key.description and key.default is not None for key in objective.keys.model_fields.values())


def test_the_oracle_knows_no_other_stage():
    with pytest.raises(KeyError):
        oracle_objectives.score(None, oracle_objectives.Options(stage="sft"))


@pytest.mark.parametrize(("keys", "loss", "rewards"), BY_HAND)
def test_by_hand(keys, loss, rewards):
    out = loss_of(**keys)(PAIR)
    assert out.loss.tolist() == pytest.approx([loss], abs=1e-14)
    assert out.sft_loss.tolist() == [1.0]
    # rewards carry no margin
    assert [out.chosen_reward.item(), out.rejected_reward.item()] == pytest.approx(rewards, abs=1e-14)


def test_own_metrics_by_hand():
    ratio = math.log((math.exp(1.5) - 1) / (math.e - 1))
    assert loss_of("orpo")(PAIR).metrics["log_odds/ratio"].item() == pytest.approx(ratio)
    out = loss_of("alphadpo", alphadpo_alpha=0.05, alphadpo_gamma_beta_ratio=0.05)(PAIR)
    assert out.metrics["target_margin"].item() == pytest.approx(0.25)


def _by_oracle(inputs, keys):
    """``(loss, gradient of the two sums, metrics)`` of each pair."""
    results = []
    for index in range(len(inputs.chosen_tokens)):
        sums = tuple(
            values[index].double().clone().requires_grad_()
            for values in (inputs.chosen_logprob, inputs.rejected_logprob)
        )
        references = inputs.reference_chosen_logprob[index].item(), inputs.reference_rejected_logprob[index].item()
        running = inputs.running and (inputs.running.mean.item(), inputs.running.deviation.item())
        counts = inputs.chosen_tokens[index].item(), inputs.rejected_tokens[index].item()
        pair = oracle_objectives.Scores(sums, counts, references, running)
        loss, metrics = oracle_objectives.score(pair, oracle_objectives.Options(**keys))
        results.append((loss.item(), [gradient.item() for gradient in torch.autograd.grad(loss, sums)], metrics))
    return results


def _assert_equals_the_oracle(inputs, keys):
    leaves = inputs.chosen_logprob.clone().requires_grad_(), inputs.rejected_logprob.clone().requires_grad_()
    out = PairLoss.of(TaskOptions(**keys))(
        dataclasses.replace(inputs, chosen_logprob=leaves[0], rejected_logprob=leaves[1])
    )
    gradients = torch.stack(torch.autograd.grad(out.loss.sum(), leaves), dim=1)
    for index, (loss, gradient, metrics) in enumerate(_by_oracle(inputs, keys)):
        assert out.loss[index].item() == pytest.approx(loss, rel=1e-12)
        assert gradients[index].tolist() == pytest.approx(gradient, rel=1e-10)
        rewards = out.chosen_reward[index].item(), out.rejected_reward[index].item()
        assert rewards == pytest.approx((metrics["rewards/chosen"], metrics["rewards/rejected"]), rel=1e-12)
        for name, values in out.metrics.items():
            assert values[index].item() == pytest.approx(metrics[name], rel=1e-10)


SEVERAL = _inputs(
    [-9.0, -2.5, -0.02, -31.0], [-8.0, -7.5, -4.0, -0.5], [9, 2, 1, 20], [5, 7, 3, 4], ([-9.5, -3, -1, -30], [-7] * 4)
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("running", [None, (0.2, 0.3), (0.2, 1e-9)])
def test_every_form_is_the_oracles(form, running):
    inputs = dataclasses.replace(SEVERAL, running=RunningStatistics(*map(_floats, running)) if running else None)
    _assert_equals_the_oracle(inputs, FORMS[form])


def _others(field):
    """Values of a key that are not its default."""
    if field.annotation is bool:
        return [not field.default]
    return [value for value in get_args(field.annotation) if value != field.default] or [0.7 * field.default + 0.07]


KEYS = [
    (stage, name, value)
    for stage, objective in OBJECTIVES.items()
    for name, field in objective.keys.model_fields.items()
    for value in _others(field)
]


@pytest.mark.parametrize(("stage", "key", "value"), KEYS)
def test_every_key_reaches_the_formula_and_has_the_oracles_default(stage, key, value):
    _assert_equals_the_oracle(SEVERAL, {"stage": stage, key: value, "pref_ftx": 0.3})
    default, changed = (PairLoss.of(TaskOptions(stage=stage, **keys))(SEVERAL).loss for keys in ({}, {key: value}))
    assert not torch.equal(default, changed)
    assert getattr(oracle_objectives.Options(), key) == OBJECTIVES[stage].keys.model_fields[key].default


@pytest.mark.parametrize("stage", [stage for stage, objective in OBJECTIVES.items() if objective.needs_reference])
def test_a_missing_reference_is_refused(stage):
    with pytest.raises(ValueError, match="reference"):
        loss_of(stage)(_inputs([-4.0], [-3.0], [4], [2]))


@pytest.mark.parametrize("stage", ["simpo", "dpo"])
def test_an_unknown_loss_type_is_refused(stage):
    with pytest.raises(ValueError, match="kto"):
        loss_of(stage, **{f"{stage}_loss_type": "kto"})


@pytest.mark.parametrize("stage", OBJECTIVES)
def test_supervised_term_divides_by_the_length_once(stage):
    # SFT of a 200-token answer at 1 nat per token costs 1, whatever its length
    long = _inputs([-200.0], [-3.0], [200], [2], ([-190.0], [-3.5]))
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


WITH_FILLERS = _inputs(
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
    chosen = _floats([a for a in means for _ in means], dtype).requires_grad_()
    rejected = _floats([b for _ in means for b in means], dtype).requires_grad_()
    one, zero = torch.ones(36, dtype=torch.int64), torch.zeros(36, dtype=dtype)
    running = RunningStatistics(_floats(0.0), _floats(0.0))
    out = PairLoss.of(TaskOptions(**FORMS[form]))(LossInputs(chosen, rejected, one, one, zero, zero, running))
    out.loss.sum().backward()
    assert out.loss.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_keep_the_type_and_only_the_loss_carries_a_gradient(form, dtype):
    inputs = _inputs([-4.0, 0.0], [-3.0, 0.0], [4, 0], [2, 0], ([-7.0, 0.0], [-1.0, 0.0]), dtype)
    inputs.chosen_logprob.requires_grad_()
    out = PairLoss.of(TaskOptions(**FORMS[form] | {"pref_ftx": 0.1}))(inputs)
    values = [out.loss, out.sft_loss, out.chosen_reward, out.rejected_reward, *out.metrics.values()]
    assert [tensor.dtype for tensor in values] == [dtype] * len(values)
    assert [tensor.requires_grad for tensor in values] == [True] + [False] * (len(values) - 1)
    assert out.metrics.keys() == OBJECTIVES[objectives.stage_of(form)].metrics.keys()


def _same(one, other, scale=1.0):
    """Loss and gradient by both sums of one objective are ``scale`` times those of the other."""
    results = []
    for objective in (one, other):
        leaves = SEVERAL.chosen_logprob.clone().requires_grad_(), SEVERAL.rejected_logprob.clone().requires_grad_()
        out = objective(dataclasses.replace(SEVERAL, chosen_logprob=leaves[0], rejected_logprob=leaves[1]))
        results.append(torch.stack([out.loss, *torch.autograd.grad(out.loss.sum(), leaves)]).detach())
    return torch.allclose(results[0], scale * results[1], rtol=1e-12, atol=1e-14)


def test_rainbowpo_without_the_reference_is_simpo_and_with_nothing_else_ln_dpo():
    keys = {"rainbowpo_beta": 3.0, "rainbowpo_gamma_beta_ratio": 0.4}
    simpo = loss_of(simpo_beta=3.0, gamma_beta_ratio=0.4)
    ln_dpo = loss_of("dpo", dpo_beta=3.0, dpo_length_norm=True)
    assert _same(loss_of("rainbowpo", rainbowpo_reference_mix=0.0, **keys), simpo)
    assert _same(loss_of("rainbowpo", rainbowpo_reference_mix=1.0, **keys), ln_dpo)
    assert not _same(loss_of("rainbowpo", rainbowpo_reference_mix=0.5, **keys), simpo)


def test_alphadpo_with_alpha_0_is_simpo():
    keys = {"alphadpo_beta": 3.0, "alphadpo_gamma_beta_ratio": 0.4}
    simpo = loss_of(simpo_beta=3.0, gamma_beta_ratio=0.4)
    assert _same(loss_of("alphadpo", alphadpo_alpha=0.0, **keys), simpo)
    assert not _same(loss_of("alphadpo", alphadpo_alpha=0.1, **keys), simpo)


@pytest.mark.parametrize("sign", [1, -1])
def test_alphapo_tends_to_simpo_linearly_in_alpha(sign):
    keys = {"alphapo_beta": 3.0, "alphapo_gamma_beta_ratio": 0.4}
    simpo = loss_of(simpo_beta=3.0, gamma_beta_ratio=0.4)(SEVERAL).loss

    def distance(alpha):
        return (loss_of("alphapo", alphapo_alpha=sign * alpha, **keys)(SEVERAL).loss - simpo).abs().max().item()

    assert _same(loss_of("alphapo", alphapo_alpha=0.0, **keys), loss_of(simpo_beta=3.0, gamma_beta_ratio=0.4))
    assert distance(1e-3) / distance(1e-4) == pytest.approx(10, rel=0.02)
    # the digits last where 1 - exp(-alpha m) has lost its own
    assert distance(1e-8) / distance(1e-4) == pytest.approx(1e-4, rel=0.02)
    assert distance(1e-300) < 1e-14


def test_the_gap_is_what_alphadpo_tracks():
    # 0.5 - (-1.25)
    assert OBJECTIVES["alphadpo"].tracked(PAIR).tolist() == [1.75]


def test_values_near_their_limits_keep_their_digits():
    from mindspeed_simpo.objectives._functions import log1m_exp

    values = [-1e-300, -1e-15, -0.1, -0.6931, -0.6932, -5.0, -40.0, -700.0]
    exact = [math.log(-math.expm1(value)) if value > -0.7 else math.log1p(-math.exp(value)) for value in values]
    assert log1m_exp(_floats(values)).tolist() == pytest.approx(exact, rel=1e-14)
    assert torch.autograd.gradcheck(log1m_exp, _floats(values[2:6]).requires_grad_())
    rounded_up = _floats([0.0, 1e-9]).requires_grad_()
    result = log1m_exp(rounded_up)
    result.sum().backward()
    assert result.isfinite().all()
    assert rounded_up.grad.tolist() == [0.0, 0.0]
