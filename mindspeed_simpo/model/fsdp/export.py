"""A sharded model as a Hugging Face folder, with the tensors and names that transformers writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from mindspeed_simpo.model.export_folder import Companions, write_config, write_on_first_rank, write_weights
from mindspeed_simpo.model.fsdp.adapters import deltas
from mindspeed_simpo.model.fsdp.description import TransformersModel
from mindspeed_simpo.model.fsdp.policy import Policy
from mindspeed_simpo.model.fsdp.quantized import dequantized

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def export_model(
    policy: Policy,
    description: TransformersModel,
    beside: Companions,
    output: Path,
) -> None:
    """Write config.json, safetensors and the files beside them; a collective, in which rank 0 gathers and writes.

    Each weight has the dtype that it has in ``source``, or that of config.json where ``source`` has no weights.
    Adapters are merged in fp32. Rank 0 needs host memory for the whole model.

    Args:
        policy: The sharded model.
        description: Of the model.
        beside: The files beside the weights.
        output: Folder to write; an earlier export is replaced.
    """
    gathered = gather(policy)

    def write(folder: Path) -> None:
        state = stored_tensors(policy, dict(gathered))
        declared = description.settings.get("dtype") or description.settings.get("torch_dtype") or "float32"
        default = (
            declared if isinstance(declared, torch.dtype) else getattr(torch, str(declared).removeprefix("torch."))
        )
        stored = stored_dtypes(beside.source)
        dtypes = {name: stored.get(name, default) for name in state}
        write_weights(folder, iter(state.items()), {name: tuple(value.shape) for name, value in state.items()}, dtypes)
        write_config(folder, beside.source, description.architecture, dtypes)
        beside.write(folder)

    write_on_first_rank(output, gathered, write)


def stored_tensors(policy: Policy, gathered: dict[str, Tensor]) -> dict[str, Tensor]:
    """What :func:`gather` yielded, by the names that transformers writes; none on ranks that it yielded nothing on."""
    return dict(revert_weight_conversion(policy.causal, gathered)) if gathered else {}


@torch.no_grad()
def gather(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, whole tensor)`` in host memory on rank 0, tensor by tensor; yield nothing on other ranks."""
    first = torch.distributed.get_rank() == 0
    added = deltas(policy.causal)
    for name, parameter in policy.weights():
        value: Tensor = parameter.detach()
        value = whole(value) if isinstance(value, DTensor) else dequantized(parameter).detach()
        if name in added:
            value = value.float() + added[name]().to(value.device).float()
        if first:
            yield name, value.cpu()
    if first:
        stored = policy.causal.state_dict().keys()
        yield from ((name, value.cpu()) for name, value in policy.causal.named_buffers() if name in stored)


def whole(tensor: DTensor) -> Tensor:
    """All of a sharded tensor, on the device of its mesh; a collective."""
    local = tensor.to_local().to(tensor.device_mesh.device_type)
    on_device = DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride(), run_check=False
    )
    result: Tensor = on_device.full_tensor()
    return result


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Name -> dtype of the tensors in a folder's safetensors files; none where it has no such files."""
    found: dict[str, torch.dtype] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            found |= {name: _DTYPES.get(file.get_slice(name).get_dtype(), torch.float32) for name in names}
    return found
