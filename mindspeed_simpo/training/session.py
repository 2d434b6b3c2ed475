"""The session of every command that runs the model: process groups, tokenizer, data, model with starting weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.file import validate
from mindspeed_simpo.config.resolution import computation
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.data.dataset import PairDataset
from mindspeed_simpo.data.loader import PairLoader
from mindspeed_simpo.data.paths import Part
from mindspeed_simpo.data.processor import load_processor
from mindspeed_simpo.data.together import prepare_together
from mindspeed_simpo.data.tokenizer import load_tokenizer
from mindspeed_simpo.device import Device, open_device
from mindspeed_simpo.errors import CheckpointError, SimpoError
from mindspeed_simpo.loss.head import ResponseHead
from mindspeed_simpo.loss.pair_loss import PairLoss
from mindspeed_simpo.loss.reference import ReferenceTable, StepReference
from mindspeed_simpo.loss.running import RunningTracker
from mindspeed_simpo.loss.scoring import PairScorer
from mindspeed_simpo.losses import RunningStatistics
from mindspeed_simpo.model.export_folder import Companions
from mindspeed_simpo.model.folder import resolve_model
from mindspeed_simpo.parallel import Groups, initialize, seed_model_ranks, shutdown
from mindspeed_simpo.parallel.collectives import fail_together
from mindspeed_simpo.parallel.lost_ranks import naming_lost_ranks
from mindspeed_simpo.training import checkpoint
from mindspeed_simpo.training.backends import Backend, open_backend
from mindspeed_simpo.training.base_model import Base, check_base, identify_base
from mindspeed_simpo.training.metrics import MetricSums
from mindspeed_simpo.training.model_card import Trained, Weights, held_out_lines, model_card
from mindspeed_simpo.training.parts import Loaders, Parts
from mindspeed_simpo.training.progress import set_up_logging
from mindspeed_simpo.training.schedule.runner import PairSchedule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """The configured parts of a run on one rank, before training."""

    config: Config
    """The configuration, with the defaults that depend on model and device set."""
    device: Device
    groups: Groups
    backend: Backend
    """The model, with the weights that ``init_from`` selects."""
    tokenizer: PreTrainedTokenizerBase
    metric_sums: MetricSums
    running: RunningTracker
    """Running statistics of the objective's tracked value over the global batches."""
    prepare: Callable[[Part], PairDataset]
    """Reads and tokenises the train or eval part of the data, the latter without prompts of the former where that is
    configured; a collective that raises on every rank or on none."""
    loader: Callable[[PairDataset], PairLoader]
    """Makes the loader of this rank's micro-batches of a dataset."""
    schedule: Callable[[list[torch.nn.Module], ReferenceTable | None], PairSchedule]
    """Makes the configured pair schedule over pipeline chunks, wrapped or not."""
    export: Callable[[Path, bool, checkpoint.TrainingState, Path], None]
    """``export(folder, merge_adapters, state, run)`` writes the current weights as a Hugging Face folder, or the
    adapters as a folder of peft unless they are to be merged, with a model card of the state and of the metrics in the
    output folder ``run``; a collective that raises on every rank or on none."""
    base: Base | None
    """The model that the adapters belong to; None without adapters, and where its weights are not read."""

    @property
    def models(self) -> Sequence[torch.nn.Module]:
        """Parts of the model on this rank, without wrappers."""
        return self.backend.models

    @property
    def is_main(self) -> bool:
        """Whether this rank is rank 0 of the world, which writes files and messages."""
        return self.groups.world.rank() == 0


def build_schedule(
    config: Config,
    backend: Backend,
    groups: Groups,
    device: Device,
    running: Callable[[], RunningStatistics | None] | None,
    models: list[torch.nn.Module],
    table: ReferenceTable | None,
) -> PairSchedule:
    """The pair schedule with the configured objective and head.

    Args:
        config: The objective's keys, ``pair_schedule``, the options of the head, and the seed of dropout.
        backend: Runs the model.
        groups: Process groups of the layout that the models were built with.
        device: The device of the models.
        running: Returns the statistics of the objective's tracked value.
        models: Pipeline chunks, wrapped or not.
        table: Sums under the reference model; None where the objective has no reference model, or the reference is the
            model without its adapters.
    """
    head = ResponseHead(
        groups.tensor,
        groups.context,
        vocab_size=backend.description.vocab_size,
        sum_dtype=device.reduction_dtype,
        softcap=backend.description.logit_softcap,
        chunk_tokens=config.chunk_tokens_in_use if config.fused_logprob else None,
        sequence_parallel=config.sequence_parallel and groups.tensor.size() > 1,
        weight_grad_awaited=config.overlap_grad_reduce,
    )
    step_reference = StepReference() if config.reference_is_base else None
    scorer = PairScorer(PairLoss.of(config), step_reference or table, running)
    return PairSchedule(
        backend.engine(models, head),
        scorer,
        groups,
        device.torch_device,
        config.pair_schedule,
        config.sequence_multiple,
        step_reference,
        config.moe_aux_loss_coeff,
        config.seed if config.lora_dropout else None,
    )


def export_checkpoint(load: str, output: Path, *, merge_adapters: bool = False) -> None:
    """Write a training checkpoint of any layout as a Hugging Face folder, or of peft, in one process.

    Args:
        load: The checkpoint, as for :func:`~mindspeed_simpo.training.checkpoint.find`.
        output: Folder to write.
        merge_adapters: Whether the checkpoint's adapters are merged into the weights that they were trained on, which
            are then read.

    Raises:
        CheckpointError: where the checkpoint is absent, incomplete or damaged, has no adapters that could be merged, or
            where their model has changed.
        ModelError: where ``output`` cannot be written, or config.json or the tokenizer of the model that training
            started from cannot be read; its weights are needed only for ``merge_adapters``.
    """
    folder, state = checkpoint.find(load, None)
    if merge_adapters and state.base is None:
        raise CheckpointError(
            f"--merge-adapters: {folder} has no adapters: it holds all weights; export it without --merge-adapters"
        )
    one_rank: dict[str, Any] = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "context_parallel_algo": "gathered",
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": None,
        "fsdp_shard_size": None,
        "fsdp_cpu_offload": False,
    }
    one_rank |= {"num_layers_per_virtual_pipeline_stage": None, "sequence_parallel": False, "device": "cpu"}
    one_rank["lora_load"] = None  # the checkpoint has the adapters
    config = validate(state.config.model_dump() | one_rank, where=str(folder))
    with open_session(config, open_device("cpu"), starting_weights=merge_adapters) as session:
        if merge_adapters:
            check_base(folder, state.base, session.base)
        checkpoint.load(folder, session.models, None, session.groups, session.device)
        session.export(output, merge_adapters, state, folder.parent.parent)


@contextmanager
def open_session(config: Config, device: Device, *, starting_weights: bool = True) -> Iterator[Session]:
    """Set up the process groups and the model with its starting weights; destroy the process groups at the end.

    Args:
        config: A validated configuration.
        device: The device, opened before this module was imported, because this module imports megatron-core.
        starting_weights: Whether the model gets the weights that ``init_from`` selects; else a checkpoint must be
            loaded.

    Raises:
        SimpoError: on every rank.
    """
    with open_groups(config, device) as groups:
        yield build_session(config, device, groups, starting_weights=starting_weights)


@contextmanager
def open_groups(config: Config, device: Device) -> Iterator[Groups]:
    """Set up the process groups, for sessions of one layout that follow each other; destroy them at the end.

    Args:
        config: A validated configuration.
        device: See :func:`open_session`.
    """
    layout = make_layout(config, int(os.environ.get("WORLD_SIZE", "1")))
    try:
        with naming_lost_ranks():
            groups = initialize(layout, device, config.distributed_timeout_minutes)
            set_up_logging(is_main=groups.world.rank() == 0)
            yield groups
    finally:
        shutdown()


def on_every_rank(error: SimpoError) -> SimpoError:
    """Mark an error that every rank raises, so that only rank 0 prints the message."""
    error.everywhere = True
    return error


def build_session(config: Config, device: Device, groups: Groups, *, starting_weights: bool = True) -> Session:
    """Read tokenizer and model, fill the starting weights, and bind the session's functions to their options.

    Args:
        config: A validated configuration.
        device: The device of this rank.
        groups: Process groups of this rank.
        starting_weights: See :func:`open_session`.

    Raises:
        SimpoError: on every rank.
    """
    device.seed(config.seed)
    seed_model_ranks(config.seed)
    with fail_together(groups.control):
        backend = open_backend(config, groups, device)
        processor = load_processor(config.model_name_or_path) if backend.description.takes_images else None
        of_processor = None if processor is None else processor.chat_template
        tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template, of_processor)
    with fail_together(groups.control):
        backend.build(starting_weights=starting_weights)
    logger.info("%s", computation(config, backend.config, device.name))
    config, vocab_size = backend.config, backend.description.vocab_size
    base = None
    if config.lora_r and starting_weights:
        base = identify_base(config, config.seed, groups.control)
    running = RunningTracker(config.objective, groups, device)
    return Session(
        config,
        device,
        groups,
        backend,
        tokenizer,
        MetricSums(config.objective, groups, device),
        running,
        prepare=Parts(
            partial(prepare_together, config, tokenizer, group=groups.control, vocab_size=vocab_size, images=processor),
            groups,
            decontaminates=config.eval_decontaminate,
        ),
        loader=Loaders(backend, groups, processor),
        schedule=partial(build_schedule, config, backend, groups, device, running.current),
        export=partial(_export, backend, groups, tokenizer),
        base=base,
    )


def _export(
    backend: Backend,
    groups: Groups,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    merge_adapters: bool,
    state: checkpoint.TrainingState,
    run: Path,
) -> None:
    config = backend.config
    folder = resolve_model(config.model_name_or_path, weights=False)
    template = None if config.chat_template is None else str(tokenizer.chat_template)
    card = None
    with fail_together(groups.control):
        if groups.world.rank() == 0:
            adapters = config.lora_r > 0 and not merge_adapters
            weights = Weights(adapters=adapters, images=backend.description.takes_images)
            trained = Trained(state.config, state.facts, state.step, state.consumed_pairs, state.data_fingerprint)
            card = model_card(trained, held_out_lines(run, state.step), weights)
    with fail_together(groups.control):
        backend.export(output, merge_adapters=merge_adapters, beside=Companions(folder, tokenizer, template, card))
