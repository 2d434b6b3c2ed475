"""Export of the trained model as a folder for ``AutoModelForCausalLM.from_pretrained``, or of its adapters for peft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.adapter_folder import write_adapter
from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.model.export_folder import (
    MAX_SHARD_BYTES,
    Companions,
    write_config,
    write_on_first_rank,
    write_weights,
)
from mindspeed_simpo.model.megatron.weights import gather_hf_tensors, gather_merged, unwrap
from mindspeed_simpo.model.naming import stored_shapes
from mindspeed_simpo.model.weight_source import SafetensorsFolder
from mindspeed_simpo.parallel import Groups


def whole_tensors(
    models: Sequence[torch.nn.Module], description: ModelDescription, groups: Groups
) -> Iterator[tuple[str, Tensor]]:
    """:func:`~mindspeed_simpo.model.megatron.weights.gather_hf_tensors`, adapters merged where there are any."""
    adapters = unwrap(models[0]).adapters
    if adapters is None:
        return gather_hf_tensors(models, description, groups)
    return gather_merged(models, description, adapters, groups)


def export_hf(
    models: Sequence[torch.nn.Module],
    description: ModelDescription,
    groups: Groups,
    *,
    beside: Companions,
    output: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json, generation_config.json, safetensors and the files beside them.

    A collective of all ranks; only global rank 0 writes. Each weight has its dtype in ``source``, or the dtype of
    config.json where ``source`` has no weights, so that an export directly after import is bit-identical; weights in
    MXFP4 are written in bf16. Adapters are merged into the weights in fp32. All files are written to a temporary hidden
    folder beside ``output`` and renamed at the end; an earlier export is replaced.

    Args:
        models: This rank's model chunks, with or without wrappers.
        description: Description of the model.
        groups: Process groups that the models were built with.
        beside: The files beside the weights; config.json of their ``source`` is copied with the dtype and architecture.
        output: Folder to write.
        max_shard_bytes: Largest size of a safetensors file; rank 0 needs this much host memory.

    Raises:
        ModelError: where ``output`` exists and is no earlier export, or cannot be written.
    """
    tensors = whole_tensors(models, description, groups)

    def write(folder: Path) -> None:
        dtypes = _stored_dtypes(beside.source, description)
        write_weights(folder, tensors, stored_shapes(description), dtypes, max_shard_bytes)
        removed = ["quantization_config"] if description.mxfp4 else []
        write_config(folder, beside.source, description.architecture, dtypes, removed)
        beside.write(folder)

    write_on_first_rank(output, tensors, write)


def export_adapters(
    models: Sequence[torch.nn.Module],
    description: ModelDescription,
    groups: Groups,
    *,
    beside: Companions,
    base: str,
    output: Path,
) -> None:
    """Write the adapters as a folder for peft, in fp32, with the files beside them.

    A collective of all ranks; see :func:`export_hf`.

    Args:
        models: This rank's model chunks, with or without wrappers; they have adapters.
        description: Description of the model.
        groups: Process groups that the models were built with.
        beside: The files beside the weights.
        base: What the adapters name as their model: a folder or a hub id.
        output: Folder to write.

    Raises:
        ModelError: where ``output`` exists and is no earlier export, or cannot be written.
    """
    adapters = unwrap(models[0]).adapters
    assert adapters is not None, "the models have adapters"
    tensors = gather_hf_tensors(models, description, groups, slots_of=adapters.slots_of)

    def write(folder: Path) -> None:
        write_adapter(folder, dict(tensors), adapters, description, base)
        beside.write(folder)

    write_on_first_rank(output, tensors, write)


def _stored_dtypes(source: Path, description: ModelDescription) -> dict[str, torch.dtype]:
    try:
        return SafetensorsFolder(source, description).dtypes
    except ModelError:
        return dict.fromkeys(stored_shapes(description), getattr(torch, description.dtype))
