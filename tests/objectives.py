"""Every objective in the forms that the tests compare with the oracle; a registered stage without a line fails."""

OBJECTIVES = {
    "sigmoid": {},
    "sigmoid + ftx": {"pref_ftx": 0.3},
    "hinge": {"simpo_loss_type": "hinge"},
    "hinge + ftx": {"simpo_loss_type": "hinge", "pref_ftx": 0.3},
    "ipo": {"simpo_loss_type": "ipo"},
    "ipo + ftx": {"simpo_loss_type": "ipo", "pref_ftx": 0.3},
    "dpo": {"stage": "dpo"},
    "simpo of sums": {"simpo_length_norm": False, "simpo_beta": 0.1},
    "dpo of means": {"stage": "dpo", "dpo_length_norm": True, "dpo_beta": 1.0},
    "orpo": {"stage": "orpo"},
    "cpo": {"stage": "cpo"},
    "simper + ftx": {"stage": "simper", "pref_ftx": 0.01},
    "alphapo": {"stage": "alphapo", "alphapo_alpha": 0.1, "alphapo_beta": 1.0},
    "rainbowpo": {"stage": "rainbowpo"},
    "repo": {"stage": "repo"},
    "alphadpo": {"stage": "alphadpo"},
}
"""Configuration keys by the name of the form.

The models of the parity matrix have random weights, whose means lie 3 nats per token apart and more: the larger scales
of published runs would show fp32's rounding of the means, many times, as an error of the loss. SimPER's loss there is a
difference of two small numbers that may be zero, which has no relative error; a supervised term of the size of its own
gradients keeps it away from zero.
"""

STATISTICS = (0.15, 0.4)
"""Mean and deviation that an objective which tracks a value is given, so that its first step depends on them."""


def stage_of(form: str) -> str:
    """The stage of a form of ``OBJECTIVES``."""
    return OBJECTIVES[form].get("stage", "simpo")
