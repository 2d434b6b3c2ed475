"""``sample``: on-policy pairs from the model's own answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from mindspeed_simpo.cli import flags
from mindspeed_simpo.cli.command import Command
from mindspeed_simpo.config.file import load_config
from mindspeed_simpo.studies.sampling.settings import SamplingSettings


def _sample(command: Any, _argv: Sequence[str]) -> int:
    settings = SamplingSettings.of(flags.own_given(command, SamplingSettings))
    # a configuration needs data, and the pairs that are written here may be the first that there are
    of_data = {"data_path": settings.output, "eval_decontaminate": False}
    config = load_config(command.config, flags.given(command) | of_data)
    from mindspeed_simpo.studies.sampling.run import sample

    report = sample(config, settings)
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


COMMAND = Command(
    "sample",
    "Sample answers of the model, score them, and write the best and the worst to each prompt as pairs for `train`; "
    "a run that was killed goes on. The last line of stdout is a JSON object.",
    _sample,
    arguments=flags.own_fields(SamplingSettings),
    configured=True,
)
