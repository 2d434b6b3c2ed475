"""What must be equal for a run to go on from a checkpoint, and what may change with a warning."""

from __future__ import annotations

import logging
from pathlib import Path

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.options import TaskOptions, TrainingOptions, effect_of
from mindspeed_simpo.errors import CheckpointError, ConfigError
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import fail_together, of_first_rank
from mindspeed_simpo.training.best import Best
from mindspeed_simpo.training.checkpoint import (
    TrainingState,
    find,
    find_newest,
    folder_of,
    list_checkpoints,
    name_best,
)

logger = logging.getLogger(__name__)

_ADAPTERS = ("lora_r", "lora_alpha_in_use", "lora_dropout", "lora_target_modules", "quantization")
_FIXED = (*_ADAPTERS, "stage", "pref_ftx", "bf16", "seed", "global_batch_size")


def find_resumed(root: Path, load: str | None, groups: Groups) -> tuple[Path, TrainingState] | None:
    """The checkpoint to resume from, verified; None for a run from the start. A collective of the world.

    Args:
        root: Output folder of the run.
        load: The key ``load``.
        groups: Process groups of this rank.

    Raises:
        CheckpointError: on every rank, where ``load`` names no checkpoint or a damaged one.
        ConfigError: on every rank, where there is no ``load`` and ``root`` has checkpoints.
    """
    own = root / "checkpoints"
    if load == "auto":
        found = find_newest(own, groups.control)
        newest = list_checkpoints(own)[-1:]
        if groups.world.rank() == 0 and newest and (found is None or found[0] != newest[0]):
            logger.warning("%s is damaged; going on from %s", newest[0], found[0] if found else "the start")
        return found
    if load is not None:
        return find(load, groups.control)
    with fail_together(groups.control):
        if earlier := list_checkpoints(own):
            raise ConfigError(
                f"output_dir: {root} holds checkpoints of another run (newest {earlier[-1].name}); set load: auto to "
                "go on with it, or another output_dir"
            )
    return None


def check_resumable(folder: Path, state: TrainingState, config: Config, data_fingerprint: str) -> None:
    """Check that a run continues the curve of the checkpoint; log the options that change the rest of the curve.

    Args:
        folder: The checkpoint.
        state: Its state.
        config: The configuration of this run.
        data_fingerprint: ``order_fingerprint`` of this run's training data.

    Raises:
        CheckpointError: where the objective, the data, their order or the precision differ.
    """
    theirs, ours = (fingerprint.partition(": ") for fingerprint in (state.data_fingerprint, data_fingerprint))
    if theirs[0] == ours[0] and theirs != ours:
        raise CheckpointError(
            f"load: {folder} was written by a run on another mixture of the same data, with {theirs[2] or 'all pairs'} "
            f"of each source in an epoch (now {ours[2] or 'all pairs'}); the order of the pairs would not go on where "
            "it stopped. Give the same sources, weight and pairs"
        )
    if theirs[0] != ours[0]:
        raise CheckpointError(
            f"load: {folder} was written by a run on other data; the order of the pairs would not go on where it "
            "stopped. Give the same data, tokenizer, chat template and seq_length"
        )
    objective = config.objective.keys.model_fields
    if fixed := _differences(state.config, config, [*_FIXED, *objective]):
        raise CheckpointError(
            f"load: {folder} was written with {fixed}; a run goes on with the same. To train the checkpoint's weights "
            "in another way, export them and start a new run from the export"
        )
    fields = TaskOptions.model_fields | TrainingOptions.model_fields
    others = [name for name, field in fields.items() if effect_of(field) == "result" and name not in objective]
    if changed := _differences(state.config, config, others):
        logger.warning("options differ from those of %s, which had %s", folder, changed)


def resumed_best(root: Path, state: TrainingState, config: Config, groups: Groups) -> Best | None:
    """The best evaluation of a run that goes on from a checkpoint; a collective of the world.

    Rank 0 has ``best.json`` name it. Where the checkpoint knows of none by the configured metric, or the best
    checkpoint is not among the run's own, the comparison begins anew.

    Args:
        root: Folder of the run's checkpoints.
        state: Of the checkpoint.
        config: The configuration of this run.
        groups: Process groups of this rank.
    """
    best = Best.of(config)
    with fail_together(groups.control):
        if groups.world.rank() == 0:
            if best is not None and state.best is not None and best.continues(state.best):
                best = state.best
            if best is not None and best.step is not None and not folder_of(root, best.step).is_dir():
                logger.warning("%s is missing: the best checkpoint is sought anew", folder_of(root, best.step))
                best = Best.of(config)
            name_best(root, best)
    return of_first_rank(best, groups.control)


def check_adapters(folder: Path, state: TrainingState, config: Config) -> None:
    """Check that a checkpoint holds the adapters that are configured, or all weights where none are.

    Args:
        folder: The checkpoint.
        state: Its state.
        config: The configuration of this run.

    Raises:
        CheckpointError: where they differ.
    """
    if fixed := _differences(state.config, config, [*_ADAPTERS]):
        raise CheckpointError(f"load: {folder} was written with {fixed}: give the same")


def _differences(theirs: Config, ours: Config, names: list[str]) -> str:
    values = [(name, getattr(theirs, name), getattr(ours, name)) for name in names]
    return ", ".join(f"{name}: {their} (now {our})" for name, their, our in values if their != our)
