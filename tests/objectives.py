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
    "dpo of means": {"stage": "dpo", "dpo_length_norm": True, "dpo_beta": 5.0},
    "orpo": {"stage": "orpo"},
    "cpo": {"stage": "cpo"},
    "simper": {"stage": "simper"},
    "alphapo": {"stage": "alphapo"},
    "rainbowpo": {"stage": "rainbowpo"},
    "repo": {"stage": "repo"},
    "alphadpo": {"stage": "alphadpo"},
}
"""Configuration keys by the name of the form."""

STATISTICS = (0.15, 0.4)
"""Mean and deviation that an objective which tracks a value is given, so that its first step depends on them."""


def stage_of(form: str) -> str:
    """The stage of a form of ``OBJECTIVES``."""
    return OBJECTIVES[form].get("stage", "simpo")
