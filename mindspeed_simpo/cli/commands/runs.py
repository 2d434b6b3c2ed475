"""``train``, ``evaluate`` and ``check``: the commands of one run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from mindspeed_simpo.cli import launch
from mindspeed_simpo.cli.command import Command, is_first_rank, open_device, resolve, without_nproc, world_size
from mindspeed_simpo.config.file import require_training_data


def _train(command: Any, argv: Sequence[str]) -> int:
    config, nproc = resolve(command)
    require_training_data(config, command.config)
    if nproc > 1:
        return launch.launch(nproc, without_nproc(argv))
    device = open_device(config)
    from mindspeed_simpo.training.trainer import train

    return train(config, device)


def _evaluate(command: Any, argv: Sequence[str]) -> int:
    config, nproc = resolve(command)
    if nproc > 1:
        return launch.launch(nproc, without_nproc(argv))
    device = open_device(config)
    from mindspeed_simpo.training.evaluation import evaluate

    metrics = evaluate(config, device)
    if is_first_rank():
        sys.stdout.write(json.dumps(metrics) + "\n")
        sys.stdout.flush()
    return 0


def _check(command: Any, _argv: Sequence[str]) -> int:
    config, nproc = resolve(command)
    require_training_data(config, command.config)
    from mindspeed_simpo.cli.check import check

    return 0 if check(config, world_size(nproc)) else 1


COMMANDS = (
    Command(
        "train", "Train with the configuration CONFIG; flags override its keys.", _train, configured=True, on_ranks=True
    ),
    Command(
        "evaluate",
        "Score the held-out pairs with the configured objective; the last line of stdout is a JSON object.",
        _evaluate,
        configured=True,
        on_ranks=True,
    ),
    Command(
        "check",
        "Check data, hyper-parameters, parallel layout and memory without training; exit code 1 on an error.",
        _check,
        configured=True,
        on_ranks=True,
    ),
)
