"""Low-rank adapters (LoRA): which projections have them, and the slots of their factors, from those of the weights."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_simpo.config.options import ALL_LINEAR, AdapterOptions
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.model.naming import Chunk, distinct_parts, pipeline_chunks
from mindspeed_simpo.model.slots import HFTensor, Slot, Span, stack
from mindspeed_simpo.model.weight_source import SeededTensors


@dataclass(frozen=True)
class AdaptedTensor:
    """One Hugging Face projection with an adapter, or that of each expert of a layer, and the slots of A and B."""

    weight: HFTensor
    """The projection; of experts, that of the first."""
    module: str
    """Last part of the projection's Hugging Face name, such as ``q_proj``."""
    a: Slot
    b: Slot


@dataclass(frozen=True)
class Adapters:
    """``y = W x + alpha / r B A x`` for the projections ``modules``: A is ``[r, inputs]``, B is ``[outputs, r]``.

    Each Hugging Face projection has factors of its own, also where one parameter holds several projections.
    """

    r: int
    alpha: float
    modules: tuple[str, ...]
    """Last parts of Hugging Face names, sorted."""
    dropout: float = 0.0
    """Probability of a zero among the inputs of A in training."""

    @classmethod
    def of(cls, options: AdapterOptions, model: ModelDescription) -> Adapters | None:
        """The configured adapters of a model; None without adapters.

        Raises:
            ConfigError: where ``lora_target_modules`` names a projection that the model does not have.
        """
        if not options.lora_r:
            return None
        known, wanted = projections(model), options.lora_target_modules
        names = [wanted] if isinstance(wanted, str) else wanted
        for name in names:
            if name not in (*known, ALL_LINEAR):
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"did you mean {nearest[0]}? " if nearest else ""
                raise ConfigError(
                    f"lora_target_modules: {model.family} has no projection {name!r} that can have an adapter; {hint}"
                    f"Known are {', '.join(known)}, and {ALL_LINEAR} for all of them"
                )
        modules = known if ALL_LINEAR in names else tuple(sorted(set(names)))
        _check_fused(modules, model)
        return cls(options.lora_r, options.lora_alpha_in_use, modules, options.lora_dropout)

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / self.r

    def adapted(self, slot: Slot) -> list[AdaptedTensor]:
        """The projections of a weight's slot that have adapters, in the order of the slot's tensors."""
        if slot.of_experts:
            return self._adapted_experts(slot)
        found = []
        for tensor in slot.tensors:
            path = tensor.name.removesuffix(".weight")
            module = module_of(tensor)
            if _is_projection(slot, tensor) and module in self.modules:
                parameter = f"{place_of(slot)}.{module}"
                found.append(AdaptedTensor(tensor, module, *self._factors(slot, tensor, path, parameter)))
        return found

    def slots(self, weights: Iterable[Slot]) -> Iterator[Slot]:
        """The slots of the factors of all adapters of some slots of weights."""
        for slot in weights:
            for tensor in self.adapted(slot):
                yield tensor.a
                yield tensor.b

    def slots_of(self, chunk: Chunk, model: ModelDescription) -> Iterator[Slot]:
        """The slots of the factors of a model chunk."""
        return self.slots(chunk.slots(model))

    def hf_tensors(self, model: ModelDescription) -> list[HFTensor]:
        """Every factor of the whole model, layer by layer, by its name in peft without the prefix of a file."""
        (whole,) = pipeline_chunks(model, 1)
        return [tensor for slot in self.slots_of(whole, model) for tensor in slot.tensors]

    def adapt_experts(self, model: ModelDescription) -> bool:
        """Whether projections of experts have adapters."""
        (whole,) = pipeline_chunks(model, 1)
        return any(slot.of_experts and self.adapted(slot) for slot in whole.slots(model))

    def beside_experts(self, model: ModelDescription) -> list[str]:
        """Names within a layer, sorted, of the adapted weights that are not of experts and are called as theirs are."""
        (whole,) = pipeline_chunks(model, 1)
        found = [(slot.of_experts, tensor.weight) for slot in whole.slots(model) for tensor in self.adapted(slot)]
        of_experts = {module_of(weight) for is_of_experts, weight in found if is_of_experts}
        return sorted(
            {w.name.split(".", 3)[-1] for is_expert, w in found if not is_expert and module_of(w) in of_experts}
        )

    def count(
        self, model: ModelDescription, chunks: Iterable[Chunk], tensor_ranks: int = 1, *, experts: bool | None = None
    ) -> int:
        """Number of parameters of the adapters of some chunks on the first rank.

        The arguments are those of :func:`~mindspeed_simpo.training.memory.count_parameters`.
        """
        parts = distinct_parts(model, chunks)
        return sum(number * _count(self, model, part, tensor_ranks, experts) for part, number in parts.items())

    def _adapted_experts(self, slot: Slot) -> list[AdaptedTensor]:
        found = []
        for projection in zip(*map(self.adapted, slot.stacked), strict=True):
            first, parameter = projection[0], f"{place_of(slot)}.{projection[0].module}"
            a = stack(f"{parameter}.lora_A", [each.a for each in projection], slot.tensor_ranks)
            b = stack(f"{parameter}.lora_B", [each.b for each in projection], slot.tensor_ranks)
            found.append(AdaptedTensor(first.weight, first.module, a, b))
        return found

    def _factors(self, slot: Slot, weight: HFTensor, path: str, parameter: str) -> tuple[Slot, Slot]:
        outputs, inputs = weight.shape
        a_name, b_name = (f"{path}.lora_{factor}.weight" for factor in "AB")
        a = HFTensor(a_name, (self.r, inputs), axis=1 if weight.axis == 1 else None, is_fp32=True)
        b = HFTensor(b_name, (outputs, self.r), axis=0 if weight.axis == 0 else None, is_fp32=True, initial=0.0)
        return _factor(slot, weight, a, f"{parameter}.lora_A"), _factor(slot, weight, b, f"{parameter}.lora_B")


def projections(model: ModelDescription) -> tuple[str, ...]:
    """Last parts of the Hugging Face names of all projections that can have adapters, sorted."""
    (whole,) = pipeline_chunks(model, 1)
    tensors = [tensor for slot in whole.slots(model) for tensor in slot.tensors if _is_projection(slot, tensor)]
    return tuple(sorted(set(map(module_of, tensors))))


def module_of(weight: HFTensor) -> str:
    """Last part of the Hugging Face name of a projection, given its weight."""
    return weight.name.removesuffix(".weight").rsplit(".", 1)[-1]


def place_of(slot: Slot) -> str:
    """Name of the module that has the adapters of a weight."""
    return f"{slot.parameter}_adapters" if slot.of_experts else f"{slot.parameter.removesuffix('.weight')}.adapters"


def _check_fused(modules: Sequence[str], model: ModelDescription) -> None:
    (whole,) = pipeline_chunks(model, 1)
    for slot in whole.slots(model):
        names = list(map(module_of, slot.stacked[0].tensors)) if slot.of_experts else []
        absent = [name for name in names if name not in modules]
        if 0 < len(absent) < len(names):
            raise ConfigError(
                f"lora_target_modules: {absent[0]} is missing: transformers stores the {' and '.join(names)} of an "
                "expert as one, and peft adapts both or neither"
            )


class InitialAdapters(SeededTensors):
    """New adapters as peft makes them: A from ``U(-1 / sqrt(inputs), 1 / sqrt(inputs))``, B zero."""

    def draw(self, values: Tensor, generator: torch.Generator) -> None:
        """See :meth:`~mindspeed_simpo.model.weight_source.SeededTensors.draw`."""
        bound = 1 / math.sqrt(values.shape[1])
        values.uniform_(-bound, bound, generator=generator)


def _is_projection(slot: Slot, tensor: HFTensor) -> bool:
    """Whether the tensor is the weight of a projection that can have an adapter.

    Embeddings, output layers and routers are none, and what is stored with that of other experts has none.
    """
    return len(tensor.shape) == 2 and tensor.place is None and not (slot.pads_vocabulary or slot.scores_experts)


def _factor(slot: Slot, weight: HFTensor, factor: HFTensor, parameter: str) -> Slot:
    divide = None if factor.axis is None else functools.partial(_factor_spans, slot, weight, factor)
    return Slot(parameter, (factor,), divide, kind="adapter")


def spans_by_weight(slot: Slot, rank: int, size: int) -> list[tuple[HFTensor, Span]]:
    """The spans of a rank's parameter, in order, each with its weight; padding belongs to the weight before it."""
    found: list[tuple[HFTensor, Span]] = []
    for span in slot.spans(rank, size):
        found.append((span.tensor or found[-1][0], span))
    return found


def _factor_spans(slot: Slot, weight: HFTensor, factor: HFTensor, rank: int, size: int) -> Sequence[Span]:
    """The elements of a factor for the rank's elements of the weight, with the same padding."""
    spans = [span for owner, span in spans_by_weight(slot, rank, size) if owner == weight]
    return [Span(factor if span.tensor is not None else None, span.start, span.stop) for span in spans]


@functools.lru_cache(maxsize=4096)
def _count(adapters: Adapters, model: ModelDescription, part: Chunk, tensor_ranks: int, experts: bool | None) -> int:
    slots = adapters.slots_of(part, model)
    return sum(math.prod(slot.shape(0, tensor_ranks)) for slot in slots if experts in (None, slot.of_experts))
