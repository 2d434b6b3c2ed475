"""Metrics from sums over pairs, all-reduced once, and the files and services that metrics are written to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_simpo.config.options import OutputOptions
from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.loss.metrics import pair_metrics
from mindspeed_simpo.loss.scoring import ScoredBatch
from mindspeed_simpo.objectives import METRICS, Objective
from mindspeed_simpo.parallel import Groups


class Totals(NamedTuple):
    """Metrics of all ranks' pairs, on the host."""

    means: dict[str, float]
    """Mean over pairs of every metric."""
    pairs: float
    """Number of pairs."""
    tokens: float
    """Tokens of both sequences of all pairs, prompts included, padding excluded."""


@dataclass(frozen=True)
class MetricSums:
    """Sums over pairs as one vector ``Float[Tensor, "size"]``: every metric, then the pairs, then the tokens."""

    objective: Objective
    groups: Groups
    device: Device

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics, in the order of the vector."""
        return (*METRICS, *self.objective.metrics)

    @property
    def size(self) -> int:
        """Entries of the vector."""
        return len(self.names) + 2

    def local(self, scored: Sequence[ScoredBatch]) -> Tensor:
        """Sums of this rank's pairs; 0 on ranks that hold replicas of another rank's values."""
        total = torch.zeros(self.size, dtype=self.device.reduction_dtype, device=self.device.torch_device)
        if self.groups.contributes_loss:
            for item in scored:
                total += self._sums(item)
        return total

    def reduce(self, sums: Tensor) -> Tensor:
        """All-reduce ``sums`` over the world, in place."""
        dist.all_reduce(sums, group=self.groups.world)
        return sums

    def totals(self, sums: Tensor) -> Totals:
        """Reduced sums as totals on the host; forces a host synchronisation."""
        *values, pairs, tokens = sums.tolist()
        return Totals({name: value / pairs for name, value in zip(self.names, values, strict=True)}, pairs, tokens)

    def _sums(self, item: ScoredBatch) -> Tensor:
        dtype = self.device.reduction_dtype
        valid = item.inputs.valid.to(dtype)
        metrics = pair_metrics(item.inputs, item.output, dtype)
        tokens = item.batch.lengths.to(dtype).view(2, -1).sum(dim=0)
        return torch.stack([*(metrics[name] for name in self.names), torch.ones_like(valid), tokens]) @ valid


class MetricsWriter:
    """Appends metrics to ``metrics.jsonl`` and ``tensorboard/``, and to wandb or swanlab where configured."""

    def __init__(self, options: OutputOptions, resolved: Mapping[str, Any], resumed_step: int | None = None) -> None:
        """Open the files of ``options.output_dir``.

        Args:
            options: The output folder, and the projects of wandb and swanlab.
            resolved: Every key of the run with its value, for wandb and swanlab.
            resumed_step: Step of the loaded checkpoint; lines of later steps are deleted. None starts a new file.

        Raises:
            ConfigError: where wandb or swanlab is configured but not installed.
        """
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = Path(options.output_dir)
        path = folder / "metrics.jsonl"
        kept = _lines_until(path, resumed_step) if resumed_step is not None else []
        path.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        purge_step = resumed_step + 1 if resumed_step is not None else None
        self._tensorboard = SummaryWriter(folder / "tensorboard", purge_step=purge_step)
        self._mirrors = _open_mirrors(options, resolved)

    def write(self, values: Mapping[str, Any]) -> None:
        """Write one metrics line.

        Args:
            values: Name -> value, with ``step`` and ``split`` (train or eval).

        Raises:
            OSError: where a file cannot be written.
        """
        line = {name: _json_number(value) for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        step, split = int(values["step"]), str(values["split"])
        named = {f"{split}/{k}": v for k, v in values.items() if k not in ("step", "split")}
        for name, value in named.items():
            self._tensorboard.add_scalar(name, value, step)
        for mirror in self._mirrors:
            mirror.log(named, step=step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._tensorboard.close()
        for mirror in self._mirrors:
            mirror.finish()


def _lines_until(path: Path, step: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            break  # an incomplete line: the run was killed while writing it
    return kept


def _json_number(value: Any) -> Any:
    # JSON has no NaN and no infinity
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_mirrors(options: OutputOptions, resolved: Mapping[str, Any]) -> list[Any]:
    mirrors = []
    for name, project in (("wandb", options.wandb_project), ("swanlab", options.swanlab_project)):
        if project is None:
            continue
        try:
            module = __import__(name)
        except ImportError:
            raise ConfigError(f"{name}_project is set but {name} is not installed: pip install {name}") from None
        module.init(project=project, config=dict(resolved))
        mirrors.append(module)
    return mirrors
