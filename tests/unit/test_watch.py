"""Alarms on streams of metrics, both ways; the best evaluation; the time left; what the options need."""

import math
import random
from typing import NamedTuple

import pytest
from rich.console import Console

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.file import validate
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.objectives import OBJECTIVES
from mindspeed_simpo.training.best import Best
from mindspeed_simpo.training.progress import TimeLeft, shown_time
from mindspeed_simpo.training.watch import summary
from mindspeed_simpo.training.watch.alarms import Alarms
from mindspeed_simpo.training.watch.required import check_held_out

REQUIRED = {"model_name_or_path": "model", "data_path": "pairs.jsonl"}
STEPS = 200
EVERY = 20


def healthy(step, noise):
    """Metrics of a SimPO run that learns: numbers as those of published 7B runs."""
    part = step / STEPS
    return {
        "loss": 1.5 - 0.5 * part + noise.gauss(0, 0.05),
        "rewards/accuracies": min(1.0, 0.55 + 0.25 * part + noise.gauss(0, 0.04)),
        "rewards/margins": 0.1 + 1.4 * part + noise.gauss(0, 0.1),
        "logps/chosen": -0.8 - 0.25 * part + noise.gauss(0, 0.05),
        "grad_norm": 8 * math.exp(noise.gauss(0, 0.4)),
        "answer_tokens": 200 + 40 * part,
    }


class At(NamedTuple):
    step: int
    part: float
    split: str
    value: float


def stream(**changes):
    """Lines of a run whose metrics are ``changes[name](at)``, of the healthy value ``at.value``."""
    noise = random.Random(0)
    for step in range(STEPS + 1):
        for split in ("train", "eval"):
            if (split == "train" and step == 0) or (split == "eval" and step % EVERY):
                continue
            values = healthy(step, noise)
            for name in ("grad_norm",) if split == "eval" else ("answer_tokens",):
                del values[name]
            values |= {
                name: change(At(step, step / STEPS, split, values[name]))
                for name, change in changes.items()
                if name in values
            }
            yield {"step": step, "split": split, **values}


def raised(lines, **options):
    alarms = Alarms(Config(**REQUIRED, **options), STEPS)
    return [alarm for line in lines for alarm in alarms.read(line)]


def test_a_healthy_run_raises_none():
    assert raised(stream()) == []


SPIKES = {60, 62, 64, 150}
WRONG = {
    "chosen_falls": ({"logps/chosen": lambda at: at.value - 1.5 * at.part}, 1),
    "margins_saturate": (
        {
            "rewards/margins": lambda at: 12 * at.part,
            "rewards/accuracies": lambda at: min(1.0, 0.5 + at.part),
        },
        1,
    ),
    "accuracy_early": (
        {"rewards/accuracies": lambda at: 1.0 if at.step >= 10 and at.split == "train" else at.value},
        1,
    ),
    "held_out_parts": (
        {"loss": lambda at: at.value + (max(0, at.part - 0.4) if at.split == "eval" else 0)},
        1,
    ),
    "gradient_norm_spikes": ({"grad_norm": lambda at: 500.0 if at.step in SPIKES else at.value}, 2),
    "answers_get_longer": ({"answer_tokens": lambda at: 200 * (1 + at.part)}, 1),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_alarm_is_raised_alone_and_not_again_before_it_clears(name):
    changes, times = WRONG[name]
    found = raised(stream(**changes))
    assert [alarm.name for alarm in found] == [name] * times
    assert any(character.isdigit() for character in found[0].message)
    assert raised(stream(**changes), alarms=False) == []


def test_an_alarm_that_cleared_is_raised_again_and_replayed_lines_say_nothing():
    def there_and_back(at):
        return at.value - (1.0 if 40 < at.step <= 80 or at.step > 140 else 0.0)

    lines = list(stream(**{"logps/chosen": there_and_back}))
    found = raised(lines)
    assert [alarm.name for alarm in found] == ["chosen_falls"] * 2
    first, second = (alarm.step for alarm in found)
    assert 40 < first <= 80
    assert second > 140
    alarms = Alarms(Config(**REQUIRED), STEPS)
    alarms.replay(line for line in lines if line["step"] <= first)
    rest = [alarm for line in lines if line["step"] > first for alarm in alarms.read(line)]
    assert rest == found[1:]


def test_bounds_follow_the_options():
    falling = list(stream(**{"logps/chosen": lambda at: at.value - 0.5 * at.part}))
    assert [alarm.name for alarm in raised(falling)] == ["chosen_falls"]
    assert raised(falling, alarm_logps_fall=2.0) == []
    spikes = list(stream(grad_norm=lambda at: 0.9 if at.step == 50 else at.value / 1000))
    assert raised(spikes) == []  # below clip_grad
    assert [alarm.name for alarm in raised(spikes, clip_grad=0.5)] == ["gradient_norm_spikes"]


def test_accuracy_before_the_first_step_and_metrics_that_are_not_finite():
    lines = list(stream())
    trivial = [line | {"rewards/accuracies": 1.0} if line["step"] == 0 else line for line in lines]
    assert [alarm.name for alarm in raised(trivial)] == ["accuracy_early"]
    broken = [line | {"loss": math.nan, "rewards/margins": None} if line["step"] == 100 else line for line in lines]
    assert raised(broken) == []


@pytest.mark.parametrize("stage", OBJECTIVES)
def test_beyond_the_flat_margin_the_gradient_is_less_than_a_hundredth(stage):
    """Of the preference term, by its formula, for pairs of one token; ORPO and SimPER declare that none is flat."""
    import torch

    from mindspeed_simpo.losses import LossInputs

    objective = OBJECTIVES[stage]
    keys = objective.keys(**{"cpo": {"cpo_alpha": 0.0, "cpo_beta": 2.5}, "dpo": {"dpo_beta": 2.5}}.get(stage, {}))
    flat = objective.flat_beyond(keys)
    if flat is None:
        assert stage in ("orpo", "simper")
        return
    chosen = torch.linspace(-20, -1e-3, 40000, dtype=torch.float64).requires_grad_()
    rejected = reference = torch.full_like(chosen, -15.0).detach()
    ones = torch.ones(40000, dtype=torch.int64)
    terms = objective.formula(LossInputs(chosen, rejected, ones, ones, reference, reference), keys)
    [gradient] = torch.autograd.grad(terms.loss.sum(), chosen)
    if stage == "alphapo":  # the gradient with respect to the reward, which is not linear in the log-probability
        [slope] = torch.autograd.grad(
            objective.formula(LossInputs(chosen, rejected, ones, ones), keys).chosen_reward.sum(), chosen
        )
        gradient = gradient / slope
    margins = (terms.chosen_reward - terms.rejected_reward).detach()
    weights = gradient.abs() / gradient.abs().max()
    assert weights[margins > flat].max() <= 0.0101
    assert weights[margins < flat - 2.0].min() > 0.0101


def test_the_best_evaluation_and_patience():
    best = Best.of(Config(**REQUIRED, metric_for_best_model="rewards/accuracies", eval_interval=1))
    values = [math.nan, 0.6, 0.6, 0.7, 0.705, 0.5]
    seen = []
    for step, value in enumerate(values, start=1):
        best = best.after(step, value, threshold=0.01)
        seen.append((best.step, best.without_improvement))
    assert seen == [(None, 1), (2, 0), (2, 1), (4, 0), (5, 1), (5, 2)]
    lower = Best.of(Config(**REQUIRED, metric_for_best_model="eval_loss", eval_interval=1))
    assert (lower.metric, lower.greater) == ("loss", False)
    assert lower.after(1, -0.5).after(2, -0.6).step == 2
    assert not lower.continues(best)
    with pytest.raises(ConfigError, match="no metric 'loss'; they have a, b"):
        lower.value_in({"a": 1.0, "b": 2.0})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"metric_for_best_model": "rewards/acuracies", "eval_interval": 5}, "did you mean rewards/accuracies?"),
        ({"metric_for_best_model": "log_odds/ratio", "eval_interval": 5}, "with stage: simpo have no metric"),
        ({"metric_for_best_model": "loss"}, "needs evaluations while the run trains, and eval_interval is 0"),
        ({"metric_for_best_model": "loss", "eval_interval": 5, "eval_iters": 0}, "and eval_iters is 0"),
        ({"early_stopping_patience": 3}, "early_stopping_patience: set metric_for_best_model too"),
        ({"load_best_model_at_end": True}, "did you mean `metric_for_best_model`?"),
    ],
)
def test_options_that_cannot_be_met(values, expected):
    with pytest.raises(ConfigError) as caught:
        validate(REQUIRED | values, where="run.yaml")
    assert expected in str(caught.value)


def test_options_that_need_held_out_pairs():
    keys = {"metric_for_best_model": "source/a/rewards/accuracies", "eval_interval": 5, "eval_generate": 2}
    with pytest.raises(ConfigError, match=r"eval_generate: 2: there are no held-out pairs: set eval_data_path"):
        check_held_out(Config(**REQUIRED, **keys))
    check_held_out(Config(**REQUIRED, **keys, split="95,5"))


def test_the_time_left():
    now = [100.0]
    left = TimeLeft(100, 10, clock=lambda: now[0])
    now[0] += 20  # ten steps and a save in 20 s
    assert left.after(20) == pytest.approx(160)
    times = [0.4, 59.4, 61, 3780, 86400 + 3600 * 4]
    assert [shown_time(seconds) for seconds in times] == ["0 s", "59 s", "1 min", "1 h 03 min", "1 d 04 h"]


def test_the_summary_on_a_terminal(tmp_path, monkeypatch, capsys):
    console = Console(force_terminal=True, width=200, stderr=True, color_system=None)
    monkeypatch.setattr(summary, "console", console)
    facts = summary.Facts(
        Config(**REQUIRED),
        tmp_path,
        10,
        pairs=8,
        held_out_pairs=0,
        ranks=4,
        seconds=75.0,
        first_step=4,
        checkpoint_of=lambda step: tmp_path / f"checkpoints/iter_{step:07d}",
    )
    summary.close(facts, summary.Ending("finished", 10, None, None), [], [])
    shown = capsys.readouterr().err
    assert "Summary" in shown
    assert "10 of 10, 8 pairs, 1 min since step 4" in shown
    checkpoint = tmp_path / "checkpoints/iter_0000010"
    # a line of its own, to be copied
    assert f"\nnext: mindspeed-simpo export --checkpoint {checkpoint} --output {tmp_path / 'hf'}\n" in shown
    assert "--eval-data-path HELD_OUT.jsonl --nproc-per-node 4" in shown
