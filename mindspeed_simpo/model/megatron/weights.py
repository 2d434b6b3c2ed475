"""Hugging Face tensors -> this rank's parameters, and the parameters (or their gradients) back on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_simpo.config.options import ModelOptions
from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.model.hf_config import resolve_model
from mindspeed_simpo.model.megatron.gpt import PolicyModel
from mindspeed_simpo.model.naming import Slot, joined
from mindspeed_simpo.model.weight_source import RandomWeights, SafetensorsFolder, WeightSource
from mindspeed_simpo.parallel import Groups


def fill_weights(
    models: Sequence[torch.nn.Module], description: ModelDescription, options: ModelOptions, groups: Groups, seed: int
) -> None:
    """Give every parameter its first value: ``init_from: weights`` reads them, ``config`` draws them from ``seed``.

    Raises:
        ModelError: see :func:`load_hf_weights`.
    """
    if options.init_from == "weights":
        load_hf_weights(models, description, options.model_name_or_path, groups)
    else:
        fill_from(models, RandomWeights(description, seed), groups)


def load_hf_weights(
    models: Sequence[torch.nn.Module], description: ModelDescription, model_name_or_path: str | Path, groups: Groups
) -> None:
    """Read a checkpoint's safetensors into the parameters, in their dtype; each rank reads only its own slices.

    Raises:
        ModelError: for absent, damaged, quantized or pickled weights, and for tensors that do not fit the description.
    """
    folder = resolve_model(str(model_name_or_path), weights=True)
    fill_from(models, SafetensorsFolder(folder, description), groups)


@torch.no_grad()
def fill_from(models: Sequence[torch.nn.Module], source: WeightSource, groups: Groups) -> None:
    """Copy ``source`` into every parameter; what only pads the vocabulary or the heads becomes zero."""
    rank, size = groups.tensor.rank(), groups.tensor.size()
    for model in map(unwrap, models):
        for slot in model.slots:
            axis, spans = slot.axis or 0, slot.spans(rank, size)
            stored = [(whole, source.read(whole)) for whole in joined(spans)]
            parts = torch.split(model.get_parameter(slot.parameter), [span.length for span in spans], axis)
            for span, part in zip(spans, parts, strict=True):
                if span.tensor is None:
                    part.zero_()
                    continue
                whole, values = next(each for each in stored if each[0].holds(span))
                part.copy_(values.narrow(axis, span.start - whole.start, span.length))


def gather_hf_tensors(
    models: Sequence[torch.nn.Module],
    description: ModelDescription,
    groups: Groups,
    value: Callable[[torch.nn.Parameter], Tensor] = lambda parameter: parameter.data,
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(Hugging Face name, whole tensor)`` on global rank 0, one tensor at a time; nothing on other ranks.

    A collective: every rank must run the iterator to its end. Names come layer by layer.

    Args:
        models: This rank's chunks, wrapped or not.
        description: Of the model.
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
        for slot in chunk.slots(description):
            if slot.replica:
                continue
            tensors: list[Tensor] = []
            if chunk in own:
                parameter = value(own[chunk].get_parameter(slot.parameter)).detach()
                tensors = _gather_tensor_ranks(slot, parameter, groups)
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


def _gather_tensor_ranks(slot: Slot, parameter: Tensor, groups: Groups) -> list[Tensor]:
    """The whole tensors of a slot on the first tensor-parallel rank; nothing on the others."""
    if slot.axis is None:
        return [parameter] if groups.tensor.rank() == 0 else []
    parameter = parameter.contiguous()
    # all_gather, because HCCL has no gather
    parts = [torch.empty_like(parameter) for _ in range(groups.tensor.size())]
    dist.all_gather(parts, parameter, group=groups.tensor)
    if groups.tensor.rank():
        return []
    wholes = {tensor.name: parameter.new_empty(tensor.shape) for tensor in slot.tensors}
    for rank, part in enumerate(parts):
        spans = slot.spans(rank, groups.tensor.size())
        for span, piece in zip(spans, torch.split(part, [span.length for span in spans], slot.axis), strict=True):
            if span.tensor is not None:
                wholes[span.tensor.name].narrow(slot.axis, span.start, span.length).copy_(piece)
    return list(wholes.values())


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
