"""Exact metrics: sums over pairs, reduced once over all ranks, and the files they are written to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.training.schedule import ScoredBatch

_MEANS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "sft_loss",
    "response_tokens/chosen",
    "response_tokens/rejected",
)
NUM_SUMS = len(_MEANS) + 2
"""Entries of a vector of sums: the means' numerators, then pairs, then tokens."""


def local_sums(scored: Sequence[ScoredBatch], groups: Groups, device: Device) -> Tensor:
    """Sums of this rank's pairs, ``Float[Tensor, "NUM_SUMS"]``; zero on ranks that only hold copies of the numbers."""
    total = torch.zeros(NUM_SUMS, dtype=device.reduction_dtype, device=device.torch_device)
    if not groups.speaks:
        return total
    for item in scored:
        total += _sums(item, device.reduction_dtype)
    return total


def reduce_sums(sums: Tensor, groups: Groups) -> Tensor:
    """The sums of all ranks, on every rank: one all-reduce of ``NUM_SUMS`` numbers."""
    dist.all_reduce(sums, group=groups.world)
    return sums


def means(sums: Tensor) -> dict[str, float]:
    """Reduced sums -> mean over pairs of every metric; also ``pairs`` and ``tokens``, which are totals."""
    values = sums.tolist()
    pairs, tokens = values[-2:]
    result = {name: value / pairs for name, value in zip(_MEANS, values, strict=False)}
    return result | {"pairs": pairs, "tokens": tokens}


def _sums(item: ScoredBatch, dtype: torch.dtype) -> Tensor:
    inputs, output = item.inputs, item.output
    valid = inputs.valid.to(dtype)
    chosen_tokens, rejected_tokens = inputs.chosen_tokens.to(dtype), inputs.rejected_tokens.to(dtype)
    chosen_reward, rejected_reward = output.chosen_reward.to(dtype), output.rejected_reward.to(dtype)
    per_pair = torch.stack(
        [
            output.loss.detach().to(dtype),
            chosen_reward,
            rejected_reward,
            (chosen_reward > rejected_reward).to(dtype),
            chosen_reward - rejected_reward,
            inputs.chosen_logprob.to(dtype) / chosen_tokens.clamp(min=1),
            inputs.rejected_logprob.to(dtype) / rejected_tokens.clamp(min=1),
            output.sft_loss.to(dtype),
            chosen_tokens,
            rejected_tokens,
            torch.ones_like(valid),
            item.batch.lengths.to(dtype).view(2, -1).sum(dim=0),
        ]
    )
    return per_pair @ valid


class MetricsWriter:
    """Appends metrics to ``metrics.jsonl`` and ``tensorboard/``, and to wandb or swanlab where asked for."""

    def __init__(self, config: Config, resumed_step: int | None = None) -> None:
        """Open the files of ``config.output_dir``; lines after ``resumed_step`` are dropped, for they come again."""
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = Path(config.output_dir)
        path = folder / "metrics.jsonl"
        kept = _lines_until(path, resumed_step) if resumed_step is not None else []
        path.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        purge_step = resumed_step + 1 if resumed_step is not None else None
        self._tensorboard = SummaryWriter(folder / "tensorboard", purge_step=purge_step)
        self._mirrors = _open_mirrors(config)

    def write(self, values: Mapping[str, Any]) -> None:
        """Write one line; ``values`` has ``step`` and ``split`` (train or eval)."""
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
            break  # a line that was being written when the run was killed
    return kept


def _json_number(value: Any) -> Any:
    # JSON has no NaN: a line must stay readable by any parser
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_mirrors(config: Config) -> list[Any]:
    mirrors = []
    for name, project in (("wandb", config.wandb_project), ("swanlab", config.swanlab_project)):
        if project is None:
            continue
        try:
            module = __import__(name)
        except ImportError:
            raise ConfigError(f"{name}_project is set but {name} is not installed: pip install {name}") from None
        module.init(project=project, config=config.model_dump())
        mirrors.append(module)
    return mirrors
