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
from jaxtyping import Float, Int
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
                total += self._values(item) @ item.inputs.valid.to(total.dtype)
        return total

    def local_by_source(
        self, scored: Sequence[ScoredBatch], starts: Int[Tensor, " bound"]
    ) -> Float[Tensor, "source _"]:
        """The sums of :meth:`local`, of the pairs of each source apart.

        Args:
            scored: Records of micro-batches.
            starts: int64 number of the first pair of each source, then the number of all pairs; on the device.
        """
        number = torch.arange(len(starts) - 1, device=self.device.torch_device)
        total = torch.zeros(len(number), self.size, dtype=self.device.reduction_dtype, device=self.device.torch_device)
        if self.groups.contributes_loss:
            for item in scored:
                source = torch.searchsorted(starts[1:], item.batch.pair_ids, right=True)
                own = (source == number[:, None]) & item.inputs.valid
                # not a product: a value that is not finite would reach the other sources
                total += torch.where(own[:, None, :], self._values(item), 0).sum(dim=2)
        return total

    def reduce(self, sums: Tensor) -> Tensor:
        """All-reduce ``sums`` over the world, in place."""
        dist.all_reduce(sums, group=self.groups.world)
        return sums

    def totals(self, sums: Tensor) -> Totals:
        """Reduced sums as totals on the host; forces a host synchronisation. Without pairs there are no means."""
        *values, pairs, tokens = sums.tolist()
        means = {name: value / pairs for name, value in zip(self.names, values, strict=True)} if pairs else {}
        return Totals(means, pairs, tokens)

    def _values(self, item: ScoredBatch) -> Float[Tensor, "size pair"]:
        """What the vector sums, of each pair."""
        dtype = self.device.reduction_dtype
        metrics = pair_metrics(item.inputs, item.output, dtype)
        tokens = item.batch.lengths.to(dtype).view(2, -1).sum(dim=0)
        return torch.stack([*(metrics[name] for name in self.names), torch.ones_like(tokens), tokens])


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
        self._file = JsonLines(folder / "metrics.jsonl", resumed_step)
        self.earlier: Sequence[Mapping[str, Any]] = self._file.earlier
        """The lines up to ``resumed_step``."""
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
        self._file.write(values)
        step, split = int(values["step"]), str(values["split"])
        named = {f"{split}/{k}": v for k, v in values.items() if k not in ("step", "split")}
        for name, value in named.items():
            self._tensorboard.add_scalar(name, value, step)
        for mirror in self._mirrors:
            mirror.log(named, step=step)

    def write_alarm(self, line: Mapping[str, Any]) -> None:
        """Write the line of an alarm, with ``step``, ``alarm``, ``message`` and ``advice``.

        Raises:
            OSError: where a file cannot be written.
        """
        self._file.write(line)
        step, name = int(line["step"]), f"alarm/{line['alarm']}"
        self._tensorboard.add_text(name, f"{line['message']}; {line['advice']}", step)
        for mirror in self._mirrors:
            mirror.log({name: 1}, step=step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._tensorboard.close()
        for mirror in self._mirrors:
            mirror.finish()


class JsonLines:
    """A file of JSON objects with a ``step``, one a line, which a resumed run goes on with."""

    def __init__(self, path: Path, resumed_step: int | None) -> None:
        """Open the file.

        Args:
            path: Of the file.
            resumed_step: Step of the loaded checkpoint; lines of later steps are deleted. None starts a new file.

        Raises:
            OSError: where the file cannot be written.
        """
        self.earlier = _lines_until(path, resumed_step) if resumed_step is not None else []
        """The lines that are kept."""
        kept = path.with_name(f".{path.name}.kept")
        kept.write_text("".join(_text(line) for line in self.earlier), encoding="utf-8")
        kept.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        self._file.write(_text(line))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            if line["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            break  # an incomplete line: the run was killed while writing it
    return kept


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps({name: json_number(value) for name, value in line.items()}, ensure_ascii=False) + "\n"


def json_number(value: Any) -> Any:
    """A value as JSON can have it: JSON has no NaN and no infinity."""
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
