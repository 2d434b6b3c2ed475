"""Pairs of response log-probabilities given as numbers, and the objectives that score them."""

import torch

from mindspeed_simpo.loss.pair_loss import PairLoss
from mindspeed_simpo.losses import LossInputs, RunningStatistics
from mindspeed_simpo.objectives import OBJECTIVES
from tests import objectives


def floats(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def pair_inputs(
    chosen,
    rejected,
    chosen_tokens,
    rejected_tokens,
    references=None,
    dtype=torch.float64,
    running=objectives.STATISTICS,
):
    return LossInputs(
        chosen_logprob=floats(chosen, dtype),
        rejected_logprob=floats(rejected, dtype),
        chosen_tokens=torch.tensor(chosen_tokens),
        rejected_tokens=torch.tensor(rejected_tokens),
        reference_chosen_logprob=floats(references[0], dtype) if references else None,
        reference_rejected_logprob=floats(references[1], dtype) if references else None,
        running=RunningStatistics(*map(floats, running)) if running else None,
    )


def loss_of(stage="simpo", pref_ftx=0.0, **keys):
    return PairLoss(OBJECTIVES[stage], OBJECTIVES[stage].keys(**keys), pref_ftx)


# means -1 and -1.5; reference means -1.75 and -0.5
PAIR = pair_inputs([-4.0], [-3.0], [4], [2], ([-7.0], [-1.0]))

SEVERAL = pair_inputs(
    [-9.0, -2.5, -0.02, -31.0], [-8.0, -7.5, -4.0, -0.5], [9, 2, 1, 20], [5, 7, 3, 4], ([-9.5, -3, -1, -30], [-7] * 4)
)
