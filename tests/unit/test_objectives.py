"""Objectives against numbers worked out by hand and against the oracle; every stage has its lines in the tables."""

import dataclasses
import math
from typing import get_args

import pytest
import torch

from mindspeed_simpo.config.options import TaskOptions
from mindspeed_simpo.loss.pair_loss import PairLoss
from mindspeed_simpo.losses import RunningStatistics
from mindspeed_simpo.objectives import OBJECTIVES
from tests import objectives, oracle_objectives
from tests.pairs import PAIR, SEVERAL, floats, loss_of, pair_inputs

FORMS = objectives.OBJECTIVES
LOSS_TYPES = ["sigmoid", "hinge", "ipo"]


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("running", [None, (0.2, 0.3), (0.2, 1e-9)])
def test_every_form_is_the_oracles(form, running):
    inputs = dataclasses.replace(SEVERAL, running=RunningStatistics(*map(floats, running)) if running else None)
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
        loss_of(stage)(pair_inputs([-4.0], [-3.0], [4], [2]))


@pytest.mark.parametrize("stage", ["simpo", "dpo"])
def test_an_unknown_loss_type_is_refused(stage):
    with pytest.raises(ValueError, match="kto"):
        loss_of(stage, **{f"{stage}_loss_type": "kto"})
