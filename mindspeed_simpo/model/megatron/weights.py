"""Hugging Face tensors -> this rank's parameters, and the parameters (or their gradients) back on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.model.description import ModelSpec, resolve_model
from mindspeed_simpo.model.megatron.gpt import PolicyModel
from mindspeed_simpo.model.naming import Slot
from mindspeed_simpo.model.weight_source import RandomWeights, SafetensorsFolder, WeightSource
from mindspeed_simpo.parallel import Groups


def fill_weights(models: Sequence[torch.nn.Module], spec: ModelSpec, config: Config, groups: Groups) -> None:
    """Give every parameter its first value: ``init_from: weights`` reads them, ``config`` draws them from ``seed``.

    Raises:
        ModelError: see :func:`load_hf_weights`.
    """
    if config.init_from == "weights":
        load_hf_weights(models, spec, config.model_name_or_path, groups)
    else:
        fill_from(models, RandomWeights(spec, config.seed), groups)


def load_hf_weights(
    models: Sequence[torch.nn.Module], spec: ModelSpec, model_name_or_path: str | Path, groups: Groups
) -> None:
    """Read a checkpoint's safetensors into the parameters, in their dtype; each rank reads only its own slices.

    Raises:
        ModelError: for absent, damaged, quantized or pickled weights, and for tensors that do not fit ``spec``.
    """
    folder = resolve_model(str(model_name_or_path), weights=True)
    fill_from(models, SafetensorsFolder(folder, spec), groups)


@torch.no_grad()
def fill_from(models: Sequence[torch.nn.Module], source: WeightSource, groups: Groups) -> None:
    """Copy ``source`` into every parameter; rows that only pad the vocabulary become zero."""
    rank, size = groups.tensor.rank(), groups.tensor.size()
    for model in map(unwrap, models):
        for slot in model.slots:
            slices = [source.read(tensor, rank, size) for tensor in slot.tensors]
            fused = slot.fuse(slices, model.spec)
            parameter = model.get_parameter(slot.parameter)
            parameter[: fused.shape[0]].copy_(fused)
            parameter[fused.shape[0] :].zero_()


def gather_hf_tensors(
    models: Sequence[torch.nn.Module],
    spec: ModelSpec,
    groups: Groups,
    value: Callable[[torch.nn.Parameter], Tensor] = lambda parameter: parameter.data,
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(Hugging Face name, whole tensor)`` on global rank 0, one tensor at a time; nothing on other ranks.

    A collective: every rank must run the iterator to its end. Names come layer by layer.

    Args:
        models: This rank's chunks, wrapped or not.
        spec: Of the model.
        groups: Of the layout that the models were built with.
        value: What to gather of each parameter, in the parameter's shape: its data, its gradient, an optimizer state.
            One dtype for all parameters.
    """
    if groups.data.rank() or groups.context.rank():
        return
    own = {model.chunk: model for model in map(unwrap, models)}
    some = next(iter(own.values()))
    like = value(some.get_parameter(some.slots[0].parameter))
    for chunk in some.chunks:
        for slot in chunk.slots(spec):
            if slot.replica:
                continue
            tensors: list[Tensor] = []
            if chunk in own:
                parameter = value(own[chunk].get_parameter(slot.parameter)).detach()
                tensors = _gather_tensor_ranks(slot, parameter, spec, groups)
            elif groups.pipeline.rank() == 0 and groups.tensor.rank() == 0:
                tensors = [like.new_empty(tensor.shape) for tensor in slot.tensors]
            for tensor, whole in zip(slot.tensors, tensors, strict=False):
                if groups.tensor.rank() == 0 and _move_to_first_stage(whole, chunk.stage, groups):
                    yield tensor.name, whole


def unwrap(model: torch.nn.Module) -> PolicyModel:
    """The :class:`PolicyModel` inside DDP and ``Float16Module``."""
    while not isinstance(model, PolicyModel):
        model = model.module  # type: ignore[assignment]
    return model


def _gather_tensor_ranks(slot: Slot, parameter: Tensor, spec: ModelSpec, groups: Groups) -> list[Tensor]:
    # all_gather, because HCCL has no gather
    whole = []
    for tensor, part in zip(slot.tensors, slot.unfuse(parameter, spec), strict=True):
        if tensor.axis is None:
            whole.append(part)
            continue
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(groups.tensor.size())]
        dist.all_gather(parts, part, group=groups.tensor)
        whole.append(torch.cat(parts, tensor.axis).narrow(tensor.axis, 0, tensor.shape[tensor.axis]))
    return whole


def _move_to_first_stage(whole: Tensor, stage: int, groups: Groups) -> bool:
    """Send ``whole`` to the first stage, or receive into it; True where it then is."""
    if groups.pipeline.rank() not in (0, stage):
        return False
    if stage == 0:
        return True
    peer = dist.get_global_rank(groups.pipeline, stage if groups.pipeline.rank() == 0 else 0)
    if groups.pipeline.rank() == 0:
        dist.recv(whole, src=peer, group=groups.pipeline)
        return True
    dist.send(whole.contiguous(), dst=peer, group=groups.pipeline)
    return False
