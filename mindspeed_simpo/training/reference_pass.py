"""The reference pass: log-probability sums under the reference model, computed once before training and cached."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from mindspeed_simpo.batch import LossInputs, LossOutput, PairBatch
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.options import ModelOptions
from mindspeed_simpo.data.cache import cache_folder
from mindspeed_simpo.data.dataset import PairDataset
from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.loss import reference
from mindspeed_simpo.loss.reference import ReferenceTable
from mindspeed_simpo.loss.scoring import PairScorer
from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.model.hf_config import read_description, resolve_model
from mindspeed_simpo.model.megatron.weights import fill_weights, load_hf_weights
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import fail_together
from mindspeed_simpo.training.optimizer import wrap_precision
from mindspeed_simpo.training.progress import counting
from mindspeed_simpo.training.schedule.runner import PairSchedule
from mindspeed_simpo.training.session import Session


@dataclasses.dataclass(frozen=True)
class ReferenceModel:
    """The reference model, and the cache of its log-probability sums."""

    path: str | None
    """``ref_model``; None for the weights that training starts from."""
    start: ModelOptions
    """The model that training starts from."""
    seed: int
    """Seed of random weights."""
    bf16: bool
    """Whether the model computes in bf16."""
    cache: Path
    """Folder of the cache."""

    def fingerprint(self, policy: ModelDescription) -> str:
        """Digest of the reference's weights.

        Raises:
            ModelError: where ``ref_model`` cannot be read or has another shape than ``policy``.
        """
        if self.path is not None and (difference := policy.difference(read_description(self.path))):
            raise ModelError(
                f"ref_model: {self.path} has another {difference}; the reference must be a model of the same shape and "
                "vocabulary"
            )
        random = self.path is None and self.start.init_from == "config"
        folder = resolve_model(self.path or self.start.model_name_or_path, weights=not random)
        return reference.model_fingerprint(folder, self.seed if random else None)


def configured_tables(
    session: Session, config: Config, datasets: Sequence[PairDataset | None]
) -> Sequence[ReferenceTable | None]:
    """:func:`reference_tables` of the configured reference model; None for every dataset without a reference model."""
    if not config.objective.needs_reference:
        return [None for _ in datasets]
    cache = cache_folder(config.data_cache_dir)
    model = ReferenceModel(config.ref_model, config, config.seed, config.bf16_in_use, cache)
    return reference_tables(session, model, datasets)


def reference_tables(
    session: Session, model: ReferenceModel, datasets: Sequence[PairDataset | None]
) -> list[ReferenceTable | None]:
    """Log-probability sums of each dataset under the reference model, from the cache or from a forward-only pass.

    The pass loads the reference weights into the session's model and restores the starting weights afterwards, so
    there is never a second model in memory. A collective of the world.

    Args:
        session: The run's session; its model has the starting weights.
        model: The reference model.
        datasets: The datasets; None for a dataset that the run does not have.

    Returns:
        One table for each dataset; None for None.

    Raises:
        ModelError: on every rank, where ``ref_model`` cannot be read or has another tokenizer or shape.
    """
    groups = session.groups
    with fail_together(groups.control):
        digest = model.fingerprint(session.description)
    present = [data for data in datasets if data is not None]
    paths = {
        data.fingerprint: reference.cache_path(model.cache, data.fingerprint, digest, bf16=model.bf16)
        for data in present
    }
    tables: dict[str, ReferenceTable] = {}
    for data in present:
        cached = _cached(paths[data.fingerprint], data, session)
        if cached is not None:
            tables[data.fingerprint] = cached
    if missing := [data for data in present if data.fingerprint not in tables]:
        if model.path is not None:
            load_hf_weights(session.models, session.description, model.path, groups)
        schedule = session.schedule(wrap_precision(session.models, bf16=model.bf16), None)
        for data in missing:
            tables[data.fingerprint] = _scored(session, schedule, data)
            with fail_together(groups.control):
                if session.is_main:
                    reference.write_cache(paths[data.fingerprint], tables[data.fingerprint])
        if model.path is not None:
            fill_weights(session.models, session.description, model.start, groups, model.seed)
    return [None if data is None else tables[data.fingerprint] for data in datasets]


def _cached(path: Path, data: PairDataset, session: Session) -> ReferenceTable | None:
    table = reference.read_cached(path, len(data), session.device)
    # the cache may exist on some hosts only, but all ranks must agree on whether to compute
    seen = torch.tensor([table is not None], dtype=torch.int32, device=session.device.torch_device)
    dist.all_reduce(seen, op=dist.ReduceOp.MIN, group=session.groups.world)
    return table if bool(seen.item()) else None


def _scored(session: Session, schedule: PairSchedule, data: PairDataset) -> ReferenceTable:
    loader = session.loader(data)
    total = -(-len(data) // loader.global_batch_size)
    with counting("reference log-probabilities", total, shown=session.is_main) as on_step:
        return compute(schedule, loader.eval_steps(None), len(data), session.groups, session.device, on_step)


def compute(
    schedule: PairSchedule,
    steps: Iterable[list[PairBatch]],
    num_pairs: int,
    groups: Groups,
    device: Device,
    on_step: Callable[[], None],
) -> ReferenceTable:
    """Log-probability sums of every pair under the current weights; a collective of the world.

    Args:
        schedule: Its models have the reference weights; its loss is not computed.
        steps: This rank's micro-batches of each global batch; all ranks' micro-batches cover the dataset.
        num_pairs: Pairs of the dataset.
        groups: The sums are all-reduced over ``groups.world``.
        device: The device of the table.
        on_step: Called after each global batch, for progress.
    """
    schedule = dataclasses.replace(schedule, scorer=PairScorer(_no_loss))
    sums = torch.zeros(num_pairs, 2, dtype=device.reduction_dtype, device=device.torch_device)
    for micro_batches in steps:
        for item in schedule.forward(micro_batches):
            real = item.batch.pair_ids >= 0
            rows = torch.stack([item.inputs.chosen_logprob, item.inputs.rejected_logprob], dim=1)
            sums[item.batch.pair_ids[real]] = rows[real]
        on_step()
    if not groups.contributes_loss:
        sums.zero_()
    dist.all_reduce(sums, group=groups.world)
    return ReferenceTable(sums)


def _no_loss(inputs: LossInputs) -> LossOutput:
    nothing = torch.zeros_like(inputs.chosen_logprob)
    return LossOutput(nothing, nothing, nothing, nothing)
