"""The identity of a model's weights: what a cache of its sums, or a checkpoint of adapters for it, belongs to."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from pydantic import BaseModel

from mindspeed_simpo.config.options import ModelOptions
from mindspeed_simpo.errors import CheckpointError
from mindspeed_simpo.loss.reference import file_digests, model_fingerprint
from mindspeed_simpo.model.folder import resolve_model
from mindspeed_simpo.parallel.collectives import fail_together, of_all_ranks


class Base(BaseModel):
    """The model that adapters belong to."""

    name: str
    """``model_name_or_path`` of the run."""
    digest: str
    """Hexadecimal digest of config.json and the weights, or of config.json and the seed of random weights."""


def identify_base(options: ModelOptions, seed: int, control: dist.ProcessGroup) -> Base:
    """The model that training starts from; a collective, in which each rank reads its share of the files.

    Args:
        options: ``model_name_or_path`` and ``init_from``.
        seed: Seed of random weights.
        control: See :class:`~mindspeed_simpo.parallel.groups.Groups`.

    Raises:
        ModelError: on every rank, where the files cannot be found.
    """
    digest = weights_digest(options.model_name_or_path, seed if options.init_from == "config" else None, control)
    return Base(name=options.model_name_or_path, digest=digest)


def weights_digest(path: str, seed: int | None, control: dist.ProcessGroup) -> str:
    """Digest of a model's files; a collective, in which each rank reads its share of them.

    Args:
        path: Hugging Face folder or hub id.
        seed: Seed of random weights, which take the place of those in files; None for the files.
        control: See :class:`~mindspeed_simpo.parallel.groups.Groups`.

    Raises:
        ModelError: on every rank, where the files cannot be found.
    """
    with fail_together(control):
        folder = resolve_model(path, weights=seed is None)
        own = file_digests(folder, weights=seed is None, rank=control.rank(), size=control.size())
    digests = {name: digest for part in of_all_ranks(own, control) for name, digest in part.items()}
    return model_fingerprint(digests, seed)


def check_base(folder: Path, trained_on: Base | None, base: Base | None) -> None:
    """Check that the adapters of a checkpoint belong to the weights of this run.

    Args:
        folder: The checkpoint.
        trained_on: The model that the checkpoint names; None where it has no adapters.
        base: The model of this run; None without adapters.

    Raises:
        CheckpointError: where the weights differ, wherever they are stored.
    """
    if trained_on is not None and base is not None and trained_on.digest != base.digest:
        raise CheckpointError(
            f"{folder} holds adapters of {trained_on.name} (digest {trained_on.digest}), and model_name_or_path is "
            f"{base.name} (digest {base.digest}), which has other weights: give the model that they were trained on"
        )
