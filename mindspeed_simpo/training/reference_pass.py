"""The reference pass: log-probability sums under the reference model, computed once before training and cached."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor

from mindspeed_simpo.batch import PairBatch
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.options import ModelOptions
from mindspeed_simpo.data.cache import cache_folder
from mindspeed_simpo.data.dataset import PairDataset
from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.loss.reference import SHARD_PAIRS, ReferenceCache, ReferenceTable
from mindspeed_simpo.loss.scoring import PairScorer, ScoredBatch
from mindspeed_simpo.losses import LossInputs, LossOutput
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import fail_together
from mindspeed_simpo.training.backends import Backend
from mindspeed_simpo.training.base_model import weights_digest
from mindspeed_simpo.training.pair_values import pair_values
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

    def fingerprint(self, backend: Backend, control: dist.ProcessGroup) -> str:
        """Digest of the reference's weights; a collective, in which each rank reads its share of the files.

        Raises:
            ModelError: on every rank, where ``ref_model`` cannot be read or has another shape than that of ``backend``.
        """
        random = self.path is None and self.start.init_from == "config"
        with fail_together(control):
            if self.path is not None and (difference := backend.difference_of(self.path)):
                raise ModelError(
                    f"ref_model: {self.path} has another {difference}; the reference must be a model of the same shape "
                    "and vocabulary"
                )
        return weights_digest(self.path or self.start.model_name_or_path, self.seed if random else None, control)


@dataclasses.dataclass(frozen=True)
class UsedPairs:
    """The pairs of a dataset whose reference sums a run needs."""

    data: PairDataset
    indices: Int64[np.ndarray, " pair"]
    """Distinct, ascending."""


def configured_tables(
    session: Session, config: Config, used: Sequence[UsedPairs | None]
) -> Sequence[ReferenceTable | None]:
    """:func:`reference_tables` of the configured reference model; None for every dataset without one that is apart."""
    if not config.objective.needs_reference or config.reference_is_base:
        return [None for _ in used]
    cache = cache_folder(config.data_cache_dir)
    model = ReferenceModel(config.ref_model, config, config.seed, config.bf16_in_use, cache)
    return reference_tables(session, model, used)


def reference_tables(
    session: Session, model: ReferenceModel, used: Sequence[UsedPairs | None]
) -> list[ReferenceTable | None]:
    """Log-probability sums of the used pairs under the reference model, from the cache or from a forward-only pass.

    The pass loads the reference weights into the session's model and restores the starting weights afterwards, so
    there is never a second model in memory. A collective of the world.

    Args:
        session: The run's session; its model has the starting weights.
        model: The reference model.
        used: Of each dataset; None for a dataset that the run does not have.

    Returns:
        One table for each dataset; None for None.

    Raises:
        ModelError: on every rank, where ``ref_model`` cannot be read or has another tokenizer or shape.
    """
    groups = session.groups
    digest = model.fingerprint(session.backend, groups.control)
    parts = [None if part is None else _Part(part, _cache(model, part.data, digest), groups.control) for part in used]
    if any(part is not None and len(part.missing) for part in parts):
        if model.path is not None:
            session.backend.load_weights(model.path)
        schedule = session.schedule(session.backend.for_scoring(), None)
        with session.backend.without_adapters():
            for part in parts:
                if part is not None:
                    part.score(session, schedule)
        if model.path is not None:
            session.backend.load_weights(None)
    return [None if part is None else part.table(session.device) for part in parts]


def _cache(model: ReferenceModel, data: PairDataset, digest: str) -> ReferenceCache:
    return ReferenceCache(model.cache, data.fingerprint, digest, bf16=model.bf16, num_pairs=len(data))


class _Part:
    """The sums of one dataset: those of the cache, and those that are still to be computed."""

    def __init__(self, used: UsedPairs, cache: ReferenceCache, control: dist.ProcessGroup) -> None:
        self._data, self._cache, self._control = used.data, cache, control
        self._sums = cache.read()
        # a cache may exist on some hosts only, but all ranks must agree on what to compute
        missing = torch.from_numpy(np.isnan(self._sums[used.indices]).any(axis=1).astype(np.int8))
        dist.all_reduce(missing, op=dist.ReduceOp.MAX, group=control)
        self.missing = used.indices[missing.numpy().astype(bool)]

    def score(self, session: Session, schedule: PairSchedule) -> None:
        """Compute the missing sums; rank 0 writes each shard when its pairs are done."""
        loader = session.loader(self._data)
        size = loader.global_batch_size
        total = sum(-(-len(chunk) // size) for chunk in _chunks(self.missing))
        with counting("reference log-probabilities", total, shown=session.is_main) as on_step:
            for chunk in _chunks(self.missing):
                steps = loader.steps_of(chunk)
                found = compute(schedule, steps, chunk, session.groups, session.device, on_step)
                self._sums[chunk] = found.double().cpu().numpy()
                with fail_together(self._control):
                    if session.is_main:
                        self._cache.write(self._sums, chunk)

    def table(self, device: Device) -> ReferenceTable:
        return ReferenceTable(torch.from_numpy(self._sums).to(device.torch_device, device.reduction_dtype))


def _chunks(pairs: Int64[np.ndarray, " pair"]) -> list[Int64[np.ndarray, " chunk"]]:
    """Ascending indices divided at the bounds of the cache's shards."""
    bounds = np.flatnonzero(np.diff(pairs // SHARD_PAIRS)) + 1
    return np.split(pairs, bounds) if len(pairs) else []


def compute(
    schedule: PairSchedule,
    steps: Iterable[list[PairBatch]],
    pairs: Int64[np.ndarray, " pair"],
    groups: Groups,
    device: Device,
    on_step: Callable[[], None],
) -> Float[Tensor, "pair 2"]:
    """Log-probability sums under the current weights; a collective of the world.

    Args:
        schedule: Its models have the reference weights; its loss is not computed.
        steps: This rank's micro-batches of each global batch of ``pairs``.
        pairs: Indices of the pairs, ascending.
        groups: The sums are all-reduced over ``groups.world``.
        device: The device of the sums.
        on_step: Called after each global batch, for progress.

    Returns:
        Sums of the chosen and of the rejected response, nats, fp64 (fp32 on NPUs).
    """
    schedule = dataclasses.replace(schedule, scorer=PairScorer(_no_loss))
    return pair_values(schedule, steps, pairs, groups, device, on_step, 2, _sums)


def _sums(item: ScoredBatch) -> Sequence[Tensor]:
    return item.inputs.chosen_logprob, item.inputs.rejected_logprob


def _no_loss(inputs: LossInputs) -> LossOutput:
    nothing = torch.zeros_like(inputs.chosen_logprob)
    return LossOutput(nothing, nothing, nothing, nothing)
