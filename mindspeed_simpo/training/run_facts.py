"""What a checkpoint records of a run for the card of its model: names of model and data, numbers of pairs, versions."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mindspeed_simpo import __version__
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.data import hub
from mindspeed_simpo.data.dataset import PairDataset

_LIBRARIES = (
    "torch",
    "torch-npu",
    "megatron-core",
    "transformers",
    "tokenizers",
    "datasets",
    "peft",
    "safetensors",
)
_DATA_FILES = (".jsonl", ".json", ".parquet")
_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_CACHED = re.compile(r"(?:models|datasets)--([^/]+?)--([^/]+)")


class Named(BaseModel):
    """A model or data set by a name that can be published: a hub id, or the last part of a local path."""

    name: str
    on_hub: bool


class SourceFacts(BaseModel):
    """A source of a mixture."""

    name: str
    pairs: int
    per_epoch: int
    """Pairs of an epoch, repetitions counted."""


class RunFacts(BaseModel):
    """Facts about a run that its configuration does not have."""

    base: Named
    """The model that training started from."""
    train_data: list[Named]
    eval_data: list[Named]
    """Data sets of ``eval_data_path``; none where the held-out pairs are a part of the training data."""
    train_pairs: int
    sources: list[SourceFacts]
    """Of the training pairs; none where every pair of all data sets is trained on once an epoch."""
    eval_pairs: int | None
    """Number of held-out pairs; None without evaluation."""
    device: str
    ranks: int
    versions: dict[str, str]
    """Library -> version, of those that are installed."""


def facts_of(
    config: Config, *, device: str, ranks: int, train_data: PairDataset, eval_data: PairDataset | None
) -> RunFacts:
    """The facts about a run on this host.

    Args:
        config: The configuration of the run.
        device: Name of the device.
        ranks: Number of ranks.
        train_data: The training pairs.
        eval_data: The held-out pairs; None without evaluation.
    """
    mixture = train_data.mixture
    of_sources = [] if mixture.is_whole else zip(train_data.sources, mixture.found, mixture.used, strict=True)
    return RunFacts(
        base=model_name(config.model_name_or_path),
        train_data=data_names(config.data_path),
        eval_data=data_names(config.eval_data_path),
        train_pairs=len(train_data),
        sources=[SourceFacts(name=name, pairs=pairs, per_epoch=used) for name, pairs, used in of_sources],
        eval_pairs=None if eval_data is None else len(eval_data),
        device=device,
        ranks=ranks,
        versions=library_versions(),
    )


def model_name(path: str) -> Named:
    """The publishable name of a model that ``model_name_or_path`` names."""
    return _named(path, on_hub=_MODEL_ID.fullmatch(path) is not None and not hub.exists(Path(path)))


def data_names(entries: Any) -> list[Named]:
    """The publishable names of data sets, each once.

    Args:
        entries: Value of ``data_path`` or ``eval_data_path``: a path, a record with ``path``, a list of these, or None.
    """
    listed = entries if isinstance(entries, list | tuple) else [] if entries is None else [entries]
    paths = [str(getattr(entry, "path", entry)) for entry in listed]
    found = [_named(path, on_hub=_is_hub_data(path)) for path in paths]
    return list({named.name: named for named in found}.values())


def library_versions() -> dict[str, str]:
    """Library -> version of this package and of the installed libraries that it trains with."""
    found = {"mindspeed-simpo": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _is_hub_data(name: str) -> bool:
    a_file = Path(name).suffix.lower() in _DATA_FILES
    return not a_file and not hub.exists(Path(name)) and hub.may_be_hub_id(name.partition(":")[0])


def _named(path: str, *, on_hub: bool) -> Named:
    if on_hub:
        return Named(name=path, on_hub=True)
    if cached := _CACHED.search(path):  # a snapshot in the cache of the hub, whose last part is a commit
        return Named(name="/".join(cached.groups()), on_hub=True)
    return Named(name=Path(path).expanduser().absolute().name or "model", on_hub=False)
