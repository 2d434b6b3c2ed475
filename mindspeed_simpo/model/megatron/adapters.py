"""Adapters on the projections of a model: their parameters, their product, and running without them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from jaxtyping import Float
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import linear

from mindspeed_simpo.model.adapters import AdaptedTensor, Adapters, spans_by_weight
from mindspeed_simpo.model.slots import Slot
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import copy_to, gather_along_first, scatter_sums_along_first, sum_over


class LowRankFactors(torch.nn.Module):
    """The factors of one Hugging Face projection on this tensor-parallel rank: ``lora_A`` and ``lora_B``."""

    lora_A: torch.nn.Parameter  # noqa: N815 - peft's names
    lora_B: torch.nn.Parameter  # noqa: N815

    def __init__(self, config: TransformerConfig, tensor: AdaptedTensor, groups: Groups) -> None:
        super().__init__()
        rank, size = groups.tensor.rank(), groups.tensor.size()
        for name, slot in (("lora_A", tensor.a), ("lora_B", tensor.b)):
            values = torch.empty(slot.shape(rank, size), dtype=config.params_dtype, device=torch.cuda.current_device())
            parameter = torch.nn.Parameter(values)
            # each rank computes the gradient of a replicated factor from its own tokens
            parameter.sequence_parallel = config.sequence_parallel and slot.axis is None  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)


class LinearAdapters(torch.nn.ModuleDict):
    """``alpha / r B A x`` of every adapted projection in one sharded weight, placed as in the weight's output.

    Of a column-parallel weight, A is replicated and B is sharded along its rows. Without sequence parallelism the
    backward sums ``dL/d(A x)`` over the ranks; with it, ``A x`` is all-gathered along the sequence, and the gradient of
    A is summed over the ranks with those of the norms. Of a row-parallel weight, A is sharded along its columns, B is
    replicated, and the ranks' ``A x`` are summed before the product with B. Only tensors of r values a token are
    communicated.

    Args:
        config: See :func:`~mindspeed_simpo.model.megatron.layers.transformer_config`.
        slot: Slot of the weight.
        tensors: Its adapted projections.
        scale: Factor of the product.
        groups: Process groups of the layout.
    """

    def __init__(
        self, config: TransformerConfig, slot: Slot, tensors: Sequence[AdaptedTensor], scale: float, groups: Groups
    ) -> None:
        super().__init__({tensor.module: LowRankFactors(config, tensor, groups) for tensor in tensors})
        self.active = True
        """False computes the layer without its adapters."""
        self._scale, self._group = scale, groups.tensor
        communications = {
            (0, False): copy_to,
            (0, True): gather_along_first,
            (1, False): sum_over,
            (1, True): scatter_sums_along_first,
        }
        self._communicate = communications[slot.axis or 0, config.sequence_parallel]
        modules = {tensor.weight: tensor.module for tensor in tensors}
        spans = spans_by_weight(slot, groups.tensor.rank(), groups.tensor.size()) if slot.axis == 0 else ()
        self._places = [(modules.get(weight), span.length) for weight, span in spans]
        """Of a column-parallel weight: (projection, or None without an adapter; rows) of its output, in order."""

    def forward(self, hidden: Float[Tensor, "held row inputs"]) -> Float[Tensor, "seq row outputs"]:
        """What the adapters add to the output of the layer, before its bias.

        Args:
            hidden: Input of the layer.
        """
        factors: list[LowRankFactors] = list(self.values())  # type: ignore[arg-type]
        stacked = torch.cat([each.lora_A for each in factors]) if len(factors) > 1 else factors[0].lora_A
        inner = self._communicate(linear(hidden, stacked), self._group) * self._scale
        parts = inner.chunk(len(factors), dim=-1)
        products = [linear(part, each.lora_B) for part, each in zip(parts, factors, strict=True)]
        return products[0] if len(self._places) <= 1 else self._placed(dict(zip(self.keys(), products, strict=True)))

    def _placed(self, products: dict[str, Tensor]) -> Tensor:
        """The products in the order of the weight's output, with zeros for projections without an adapter."""
        rows = {name: [number for module, number in self._places if module == name] for name in products}
        pieces = {name: iter(torch.split(product, rows[name], dim=-1)) for name, product in products.items()}
        some = next(iter(products.values()))
        zeros = some.new_zeros(()).expand(*some.shape[:-1], 1)
        placed = [
            zeros.expand(*some.shape[:-1], number) if name is None else next(pieces[name])
            for name, number in self._places
        ]
        return torch.cat(placed, dim=-1)


def attach(
    model: torch.nn.Module, config: TransformerConfig, slots: Iterable[Slot], adapters: Adapters, groups: Groups
) -> list[Slot]:
    """Freeze a model chunk and give its projections adapters, with uninitialised factors.

    Args:
        model: The chunk, whose parameters ``slots`` name.
        config: See :func:`~mindspeed_simpo.model.megatron.layers.transformer_config`.
        slots: The slots of the chunk's weights.
        adapters: What to adapt.
        groups: Process groups of the layout.

    Returns:
        The slots of the factors.
    """
    model.requires_grad_(False)
    found: list[Slot] = []
    for slot in slots:
        if tensors := adapters.adapted(slot):
            layer = model.get_submodule(slot.parameter.removesuffix(".weight"))
            layer.adapters = LinearAdapters(config, slot, tensors, adapters.scale, groups)
            found += chain.from_iterable((tensor.a, tensor.b) for tensor in tensors)
    return found


@contextmanager
def without_adapters(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Compute the models without their adapters inside of the context.

    Args:
        models: Model chunks, wrapped or not.
    """
    present = [part for model in models for part in model.modules() if isinstance(part, LinearAdapters)]
    for part in present:
        part.active = False
    try:
        yield
    finally:
        for part in present:
            part.active = True
