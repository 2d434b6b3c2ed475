"""What every command that runs the model sets up first: device, ranks, tokenizer, data, model."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from mindspeed_simpo.batch import RunningStatistics
from mindspeed_simpo.config.config import Config, Layout
from mindspeed_simpo.config.file import validate
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.cache import cache_folder
from mindspeed_simpo.data.dataset import PairDataset, prepare_pairs
from mindspeed_simpo.data.loader import PairLoader
from mindspeed_simpo.data.tokenizer import load_tokenizer
from mindspeed_simpo.device import Device, open_device
from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.loss import reference
from mindspeed_simpo.loss.head import ResponseHead
from mindspeed_simpo.loss.pair_loss import PairLoss
from mindspeed_simpo.loss.reference import ReferenceTable
from mindspeed_simpo.loss.running import RunningTracker
from mindspeed_simpo.loss.scoring import PairScorer
from mindspeed_simpo.model.description import ModelSpec, read_model_spec, resolve_model
from mindspeed_simpo.model.megatron.export import export_hf
from mindspeed_simpo.model.megatron.gpt import build_model
from mindspeed_simpo.model.megatron.weights import fill_weights, load_hf_weights
from mindspeed_simpo.parallel import Groups, initialize, seed_model_ranks, shutdown
from mindspeed_simpo.parallel.collectives import fail_together
from mindspeed_simpo.parallel.roll_call import naming_lost_ranks
from mindspeed_simpo.training import checkpoint, reference_pass
from mindspeed_simpo.training.metrics import MetricSums
from mindspeed_simpo.training.optimizer import wrap_precision
from mindspeed_simpo.training.progress import counting, set_up_logging
from mindspeed_simpo.training.schedule.runner import PairSchedule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """One rank's view of a run, before anything is trained."""

    config: Config
    layout: Layout
    device: Device
    groups: Groups
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec
    models: Sequence[torch.nn.Module]
    """Pipeline chunks, with the weights that ``init_from`` asks for."""
    metric_sums: MetricSums
    running: RunningTracker
    """Statistics that the objective tracks over the global batches."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.groups.world.rank() == 0

    def prepare(self, part: Literal["train", "eval"]) -> PairDataset:
        """Tokenise a part of the data on the first rank of each host; the others read its cache.

        Raises:
            DataError: on every rank.
        """
        dataset = None
        with fail_together(self.groups.world):
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:
                dataset = prepare_pairs(self.config, self.tokenizer, part, progress=self.is_main)
        with fail_together(self.groups.world):
            return dataset or prepare_pairs(self.config, self.tokenizer, part, progress=False)

    def loader(self, dataset: PairDataset) -> PairLoader:
        """This rank's share of a dataset."""
        return PairLoader(
            dataset,
            seed=self.config.seed,
            global_batch_size=self.config.global_batch_size,
            batching=Batching.of(self.config),
            data_parallel_rank=self.groups.data.rank(),
            data_parallel_size=self.groups.data.size(),
        )

    def schedule(self, models: list[torch.nn.Module], table: ReferenceTable | None) -> PairSchedule:
        """The configured objective over the given chunks."""
        return build_schedule(self.config, models, self.spec, self.groups, self.device, table, self.running.current)

    def export(self, output: Path) -> None:
        """Write the model as it stands as a Hugging Face folder.

        Raises:
            ModelError: on every rank.
        """
        source = resolve_model(self.config.model_name_or_path, weights=False)
        with fail_together(self.groups.world):
            export_hf(self.models, self.spec, self.groups, source=source, output=output, tokenizer=self.tokenizer)


def build_schedule(
    config: Config,
    models: list[torch.nn.Module],
    spec: ModelSpec,
    groups: Groups,
    device: Device,
    table: ReferenceTable | None = None,
    running: Callable[[], RunningStatistics | None] | None = None,
) -> PairSchedule:
    """The configured objective, head and pair schedule over pipeline chunks.

    Args:
        config: The objective's keys, ``pair_schedule`` and the head's options.
        models: Wrapped or not.
        spec: Of the model.
        groups: Of the layout that the models were built with.
        device: Of the models.
        table: Sums under the reference model, where the objective needs them.
        running: Statistics of the objective's tracked value.
    """
    return PairSchedule(
        models=models,
        scorer=PairScorer(PairLoss.of(config), table, running),
        head=ResponseHead(
            groups.tensor,
            groups.context,
            vocab_size=spec.vocab_size,
            sum_dtype=device.reduction_dtype,
            softcap=spec.logit_softcap,
            chunk_tokens=config.logprob_chunk_tokens if config.fused_logprob else None,
            sequence_parallel=config.sequence_parallel and groups.tensor.size() > 1,
            weight_grad_awaited=config.overlap_grad_reduce,
        ),
        groups=groups,
        device=device.torch_device,
        pair_schedule=config.pair_schedule,
    )


def export_checkpoint(load: str, output: Path) -> None:
    """Write a training checkpoint as a Hugging Face folder, in one process, whatever layout trained it.

    Args:
        load: As :func:`~mindspeed_simpo.training.checkpoint.find` takes it.
        output: Folder to write.

    Raises:
        CheckpointError: where the checkpoint is absent, half-written or damaged.
        ModelError: where ``output`` cannot be written, or the model that training started from is gone.
    """
    folder, state = checkpoint.find(load)
    one_rank: dict[str, Any] = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "context_parallel_algo": "gathered",
    }
    one_rank |= {"num_layers_per_virtual_pipeline_stage": None, "sequence_parallel": False, "device": "cpu"}
    config = validate(state.config.model_dump() | one_rank, where=str(folder))
    with open_session(config, open_device("cpu")) as session:
        checkpoint.load(folder, session.models, None, session.groups, session.device)
        session.export(output)


@contextmanager
def open_session(config: Config, device: Device) -> Iterator[Session]:
    """Join the ranks, build the model with its starting weights, and leave the ranks at the end.

    Args:
        config: Validated.
        device: Opened before this module was imported, for it imports megatron-core.

    Raises:
        SimpoError: on every rank.
    """
    layout = config.layout(int(os.environ.get("WORLD_SIZE", "1")))
    try:
        with naming_lost_ranks():
            groups = initialize(layout, device, config.distributed_timeout_minutes)
            set_up_logging(is_main=groups.world.rank() == 0)
            yield _build_session(config, layout, device, groups)
    finally:
        shutdown()


def _build_session(config: Config, layout: Layout, device: Device, groups: Groups) -> Session:
    device.seed(config.seed)
    seed_model_ranks(config.seed)
    with fail_together(groups.world):
        spec = read_model_spec(config.model_name_or_path)
        spec.check_layout(config)
        tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template)
    with fail_together(groups.world):
        models = build_model(spec, config, groups, device)
        fill_weights(models, spec, config, groups)
    sums = MetricSums(config.objective, groups, device)
    running = RunningTracker(config.objective, groups, device)
    return Session(config, layout, device, groups, tokenizer, spec, models, sums, running)


def reference_tables(session: Session, datasets: Sequence[PairDataset | None]) -> list[ReferenceTable | None]:
    """Sums under the reference model of each dataset, from the cache or from a forward-only pass; else Nones.

    Leaves the model with its starting weights: while training, no second model is in memory.

    Raises:
        ModelError: on every rank, where ``ref_model`` cannot be read or has another tokenizer or shape.
    """
    config, device, groups = session.config, session.device, session.groups
    if not config.objective.needs_reference:
        return [None for _ in datasets]
    with fail_together(groups.world):
        if config.ref_model is not None:
            _check_reference(config.ref_model, session.spec)
        random = config.ref_model is None and config.init_from == "config"
        folder = resolve_model(config.ref_model or config.model_name_or_path, weights=not random)
        digest = reference.model_fingerprint(folder, config.seed if random else None)
    tables = [_cached_table(session, data, digest) for data in datasets]
    missing = [data is not None and table is None for data, table in zip(datasets, tables, strict=True)]
    if not any(missing):
        return tables
    if config.ref_model is not None:
        load_hf_weights(session.models, session.spec, config.ref_model, groups)
    schedule = session.schedule(wrap_precision(session.models, bf16=config.bf16), None)
    for index, data in enumerate(datasets):
        if data is None or not missing[index]:
            continue
        steps = session.loader(data).eval_steps(None)
        total = -(-len(data) // config.global_batch_size)
        with counting("reference log-probabilities", total, shown=session.is_main) as on_step:
            table = reference_pass.compute(schedule, steps, len(data), groups, device, on_step)
        with fail_together(groups.world):
            if session.is_main:
                reference.write_cache(_cache_path(session, data, digest), table)
        tables[index] = table
    if config.ref_model is not None:
        fill_weights(session.models, session.spec, config, groups)
    return tables


def _check_reference(ref_model: str, policy: ModelSpec) -> None:
    spec = read_model_spec(ref_model)
    for field in dataclasses.fields(spec):
        ours, theirs = getattr(policy, field.name), getattr(spec, field.name)
        if ours != theirs and field.name not in ("dtype", "initializer_range", "max_position_embeddings"):
            raise ModelError(
                f"ref_model: {ref_model} has another {field.name} ({theirs}) than the trained model ({ours}); "
                "the reference must be a model of the same shape and vocabulary"
            )


def _cached_table(session: Session, data: PairDataset | None, digest: str) -> ReferenceTable | None:
    if data is None:
        return None
    table = reference.read_cached(_cache_path(session, data, digest), len(data), session.device)
    # a cache that only some ranks see must not split them
    seen = torch.tensor([table is not None], dtype=torch.int32, device=session.device.torch_device)
    dist.all_reduce(seen, op=dist.ReduceOp.MIN, group=session.groups.world)
    return table if bool(seen.item()) else None


def _cache_path(session: Session, data: PairDataset, digest: str) -> Path:
    folder = cache_folder(session.config.data_cache_dir)
    return reference.cache_path(folder, data.fingerprint, digest, bf16=session.config.bf16)
