"""Import of Hugging Face tensors into this rank's parameters, and their inverse, a gather on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_simpo.config.options import AdapterOptions, ModelOptions
from mindspeed_simpo.model.adapter_folder import AdapterFolder, merged
from mindspeed_simpo.model.adapters import Adapters, InitialAdapters
from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.model.folder import resolve_model
from mindspeed_simpo.model.megatron.gpt import PolicyModel
from mindspeed_simpo.model.naming import Chunk
from mindspeed_simpo.model.slots import HFTensor, Slot, Span, joined
from mindspeed_simpo.model.weight_source import RandomWeights, SafetensorsFolder, WeightSource
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.groups import FirstRankFirst, Shards


def fill_weights(
    models: Sequence[torch.nn.Module], description: ModelDescription, options: ModelOptions, groups: Groups, seed: int
) -> None:
    """Initialise every weight: from the checkpoint (``init_from: weights``) or at random (``init_from: config``).

    Args:
        models: This rank's model chunks, with or without wrappers.
        description: Description of the model.
        options: ``init_from`` and ``model_name_or_path`` are read.
        groups: Process groups that the models were built with.
        seed: Seed of random weights.

    Raises:
        ModelError: see :func:`load_hf_weights`.
    """
    if options.init_from == "weights":
        load_hf_weights(models, description, options.model_name_or_path, groups)
    else:
        fill_from(models, RandomWeights(description, seed), groups)


def fill_adapters(
    models: Sequence[torch.nn.Module], description: ModelDescription, options: AdapterOptions, groups: Groups, seed: int
) -> None:
    """Initialise the adapters, where there are any: from ``lora_load``, or new ones whose product is zero.

    Args:
        models: This rank's model chunks, with or without wrappers.
        description: Description of the model.
        options: ``lora_load`` is read.
        groups: Process groups that the models were built with.
        seed: Seed of new adapters.

    Raises:
        ModelError: where ``lora_load`` cannot be read, or does not hold these adapters of this model.
    """
    adapters = unwrap(models[0]).adapters
    if adapters is None:
        return
    folder = options.lora_load
    source = InitialAdapters(seed) if folder is None else AdapterFolder(Path(folder), adapters, description)
    for model in map(unwrap, models):
        _fill(model, model.adapter_slots, source, groups)


def load_hf_weights(
    models: Sequence[torch.nn.Module], description: ModelDescription, model_name_or_path: str | Path, groups: Groups
) -> None:
    """Read the safetensors of a checkpoint into the parameters and convert dtypes; each rank reads only its own slices.

    Raises:
        ModelError: for absent, damaged, quantized or pickled weights, and for tensors that do not fit the description.
    """
    folder = resolve_model(str(model_name_or_path), weights=True)
    fill_from(models, SafetensorsFolder(folder, description), groups)


def fill_from(models: Sequence[torch.nn.Module], source: WeightSource, groups: Groups) -> None:
    """Copy slices of ``source`` into every weight; padding of the vocabulary and of the heads becomes zero."""
    for model in map(unwrap, models):
        _fill(model, model.slots, source, groups)


@torch.no_grad()
def _fill(model: PolicyModel, slots: Iterable[Slot], source: WeightSource, groups: Groups) -> None:
    for slot in slots:
        shards = groups.shards(experts=slot.of_experts)
        parameter = model.get_parameter(slot.parameter)
        for block in slot.split(parameter, shards.rank, shards.size):
            _fill_block(block, slot.axis or 0, source)


def _fill_block(block: Sequence[tuple[Span, Tensor]], axis: int, source: WeightSource) -> None:
    stored = [(whole, source.read(whole)) for whole in joined([span for span, _ in block])]
    for span, part in block:
        if span.tensor is None:
            part.zero_()
            continue
        whole, values = next(each for each in stored if each[0].contains(span))
        part.copy_(values.narrow(axis, span.start - whole.start, span.length))


def gather_hf_tensors(
    models: Sequence[torch.nn.Module],
    description: ModelDescription,
    groups: Groups,
    value: Callable[[torch.nn.Parameter], Tensor] = lambda parameter: parameter.data,
    slots_of: Callable[[Chunk, ModelDescription], Iterable[Slot]] = Chunk.slots,
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(Hugging Face name, full tensor)`` on global rank 0, tensor by tensor; yield nothing on other ranks.

    A collective: every rank must exhaust the iterator. The order is that of the layers. Before each tensor the other
    ranks wait for rank 0, without the time limit of training, for what rank 0 does with the tensor may take long. A
    tensor that holds all experts of a layer is put together on rank 0.

    Args:
        models: This rank's model chunks, with or without wrappers.
        description: Description of the model.
        groups: Process groups that the models were built with.
        value: Function of a parameter that returns the tensor to gather, in the parameter's shape, such as its data,
            its gradient or an optimizer state; of one dtype for all parameters that are not always fp32.
        slots_of: Function of a chunk of any pipeline rank that returns the slots to gather: of the weights, or
            :meth:`~mindspeed_simpo.model.adapters.Adapters.slots_of` of the adapters.
    """
    wholes: dict[str, tuple[Tensor, int]] = {}
    for tensor, values in _gather_tensors(models, description, groups, value, slots_of):
        place = tensor.place
        if place is None:
            yield tensor.name, values
            continue
        whole, held = wholes.pop(place.name, (values.new_empty(place.shape), 0))
        place.view(whole).copy_(values)
        held += values.numel()
        if held == whole.numel():
            yield place.name, whole
        else:
            wholes[place.name] = whole, held
    assert not wholes, f"parts of experts are missing from {sorted(wholes)}"


def _gather_tensors(
    models: Sequence[torch.nn.Module],
    description: ModelDescription,
    groups: Groups,
    value: Callable[[torch.nn.Parameter], Tensor],
    slots_of: Callable[[Chunk, ModelDescription], Iterable[Slot]],
) -> Iterator[tuple[HFTensor, Tensor]]:
    """See :func:`gather_hf_tensors`; of a tensor that holds all experts of a layer, the part of each expert."""
    first_rank = FirstRankFirst()
    own = {model.chunk: model for model in map(unwrap, models)}
    for model in own.values():
        for module in model.modules():
            model.await_parameters(module)
    some = next(iter(own.values()))
    like = value(some.get_parameter(next(iter(slots_of(some.chunk, description))).parameter))
    for chunk in some.chunks:
        for slot in slots_of(chunk, description):
            shards = groups.shards(experts=slot.of_experts)
            if slot.replica or shards.copy:
                continue
            first_rank.wait(slot.tensors[0].name)
            tensors: list[Tensor] = []
            if chunk in own:
                parameter = value(own[chunk].get_parameter(slot.parameter)).detach()
                tensors = _gather_shards(slot, parameter, shards)
            elif groups.pipeline.rank() == 0 and shards.rank == 0:
                tensors = [
                    like.new_empty(tensor.shape, dtype=torch.float32 if tensor.is_fp32 else like.dtype)
                    for tensor in slot.tensors
                ]
            for tensor, whole in zip(slot.tensors, tensors, strict=False):
                first_rank.wait(tensor.name)
                if shards.rank == 0 and _move_to_first_pipeline_rank(whole, chunk.pipeline_rank, groups):
                    yield tensor, whole


def gather_merged(
    models: Sequence[torch.nn.Module], description: ModelDescription, adapters: Adapters, groups: Groups
) -> Iterator[tuple[str, Tensor]]:
    """:func:`gather_hf_tensors` with ``W + alpha / r B A``, in fp32, in place of each adapted weight.

    Args:
        models: This rank's model chunks, with or without wrappers.
        description: Description of the model.
        adapters: The adapters of the models.
        groups: Process groups that the models were built with.
    """
    factors = dict(gather_hf_tensors(models, description, groups, slots_of=adapters.slots_of))
    for name, weight in gather_hf_tensors(models, description, groups):
        a, b = (factors.get(name.removesuffix("weight") + f"lora_{factor}.weight") for factor in "AB")
        yield name, weight if a is None or b is None else merged(weight, a, b, adapters.scale)


def unwrap(model: torch.nn.Module) -> PolicyModel:
    """The :class:`PolicyModel` inside the wrappers of megatron-core, DDP and ``Float16Module``."""
    while not isinstance(model, PolicyModel):
        model = model.module  # type: ignore[assignment]
    return model


def _gather_shards(slot: Slot, parameter: Tensor, shards: Shards) -> list[Tensor]:
    """The full tensors of a slot on the first rank of the shards; an empty list on the other ranks."""
    if slot.axis is None and not slot.of_experts:
        return [parameter] if shards.rank == 0 else []
    parameter = parameter.contiguous()
    # all_gather, because HCCL has no gather
    parts = [torch.empty_like(parameter) for _ in range(shards.size)]
    dist.all_gather(parts, parameter, group=shards.group)
    if shards.rank:
        return []
    wholes = {tensor.name: parameter.new_empty(tensor.shape) for tensor in slot.tensors}
    for rank, part in enumerate(parts):
        for span, piece in chain.from_iterable(slot.split(part, rank, shards.size)):
            if span.tensor is not None:
                wholes[span.tensor.name].narrow(slot.axis or 0, span.start, span.length).copy_(piece)
    return list(wholes.values())


def _move_to_first_pipeline_rank(whole: Tensor, source: int, groups: Groups) -> bool:
    """Send ``whole`` from pipeline rank ``source`` to pipeline rank 0, or receive into ``whole``; True on rank 0."""
    if groups.pipeline.rank() not in (0, source):
        return False
    if source == 0:
        return True
    peer = dist.get_global_rank(groups.pipeline, source if groups.pipeline.rank() == 0 else 0)
    if groups.pipeline.rank() == 0:
        dist.recv(whole, src=peer, group=groups.pipeline)
        return True
    dist.send(whole.contiguous(), dst=peer, group=groups.pipeline)
    return False
