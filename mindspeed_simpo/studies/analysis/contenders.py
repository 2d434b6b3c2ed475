"""What ``--load`` and ``--against`` name: runs, checkpoints, Hugging Face folders and the starting weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.file import validate
from mindspeed_simpo.config.options import AdapterOptions, ModelOptions, TaskOptions
from mindspeed_simpo.data import hub
from mindspeed_simpo.errors import CheckpointError, ConfigError
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import fail_together, of_first_rank
from mindspeed_simpo.training import checkpoint

STARTING_WEIGHTS = "base"
"""The value of ``--against`` for the weights that training starts from."""
_NO_ADAPTERS = {name: field.default for name, field in AdapterOptions.model_fields.items()}


@dataclass(frozen=True)
class Contender:
    """A model to be scored."""

    config: Config
    """Names the weights, the objective and the data."""
    name: str
    """Name where the objective does not tell it from the other model."""
    run: Path | None
    """Output folder of the run; None for weights that belong to no run."""


def contender_of(config: Config, groups: Groups) -> Contender:
    """The model that the configuration names: that of ``load``, or the starting weights; a collective.

    Raises:
        CheckpointError: on every rank, where ``load`` names no checkpoint.
    """
    if config.load is None:
        return Contender(config, "starting weights", None)
    load = config.output_dir if config.load == "auto" else config.load
    folder = checkpoint.choose(load, groups.control)
    run = run_folder(folder)
    return Contender(_updated(config, "--load", load=str(folder)), run.name, run)


def rival_of(against: str, config: Config, groups: Groups) -> Contender:
    """The model that ``--against`` names; a collective.

    A run or checkpoint is scored by its own objective, keys, reference and adapters; the pairs, the layout and the
    device are those of ``config``.

    Args:
        against: ``base``, an output folder, a checkpoint, or a Hugging Face folder or hub id.
        config: The configuration of the run that is analysed.
        groups: Process groups of this rank.

    Raises:
        SimpoError: on every rank, where it names nothing that can be scored.
    """
    if against == STARTING_WEIGHTS:
        return Contender(_updated(config, "--against", load=None, lora_load=None), "starting weights", None)
    with fail_together(groups.control):
        given = Path(against).expanduser()
        if (given / "config.json").is_file() or (not given.is_dir() and hub.may_be_hub_id(against)):
            return Contender(_with_weights(config, str(given) if given.is_dir() else against), given.name, None)
        chosen = _checkpoint_of(against)
    folder = of_first_rank(chosen, groups.control)
    with fail_together(groups.control):
        try:
            theirs = checkpoint.read_state(folder).config
        except (OSError, ValueError) as error:
            raise CheckpointError(f"--against: {folder}: its state.json cannot be read: {error}") from None
        names = [*TaskOptions.model_fields, *ModelOptions.model_fields, *AdapterOptions.model_fields, "seed", "bf16"]
        own = {name: getattr(theirs, name) for name in names}
        run = run_folder(folder)
        return Contender(_updated(config, f"--against {folder}", **own, load=str(folder)), run.name, run)


def _checkpoint_of(against: str) -> Path:
    given = Path(against).expanduser()
    if (given / "adapter_config.json").is_file():
        raise ConfigError(
            f"--against: {against} holds adapters without the model's weights; give the run that trained them"
        )
    try:
        return checkpoint.choose(str(given), None)
    except CheckpointError:
        found = "holds none of them" if given.is_dir() else "is no folder"
        raise ConfigError(
            f"--against: expected the output folder or a checkpoint of a run, a Hugging Face folder or `base`; "
            f"{against} {found}"
        ) from None


def run_folder(folder: Path) -> Path:
    """Output folder of the run that wrote a checkpoint; the checkpoint itself where it lies elsewhere."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def _with_weights(config: Config, model: str) -> Config:
    """The configuration with the weights of a Hugging Face folder, and the reference that it had."""
    changed: dict[str, Any] = {**_NO_ADAPTERS, "model_name_or_path": model, "init_from": "weights", "load": None}
    if config.objective.needs_reference and config.ref_model is None:
        if config.init_from == "config":
            raise ConfigError(
                f"--against: {model} has no reference: {config.objective.title}'s reference is the random weights of "
                "init_from: config; set ref_model"
            )
        changed["ref_model"] = config.model_name_or_path
    return _updated(config, f"--against {model}", **changed)


def _updated(config: Config, where: str, **values: Any) -> Config:
    return validate(config.model_dump() | values, where=where)
