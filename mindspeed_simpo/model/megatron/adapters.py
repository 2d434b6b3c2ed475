"""Adapters on the projections of a model: their parameters, their product, and running without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import linear

from mindspeed_simpo.device.grouped import grouped_linear
from mindspeed_simpo.model.adapters import AdaptedTensor, Adapters, place_of, spans_by_weight
from mindspeed_simpo.model.dropout import InputDropout, Multiply, TokenKeys, feature_keys, mixed, projection_word
from mindspeed_simpo.model.slots import Slot, Span
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import copy_to, gather_along_first, scatter_sums_along_first, sum_over


class LowRankFactors(torch.nn.Module):
    """This rank's part of the factors ``lora_A`` and ``lora_B`` of one Hugging Face projection.

    Of a projection of experts the factors of all experts of the rank are stacked. The factors are fp32 whatever the
    dtype of the model, and are rounded to that of their input for each product.
    """

    lora_A: torch.nn.Parameter  # noqa: N815 - peft's names
    lora_B: torch.nn.Parameter  # noqa: N815

    def __init__(self, config: TransformerConfig, tensor: AdaptedTensor, groups: Groups) -> None:
        super().__init__()
        for name, slot in (("lora_A", tensor.a), ("lora_B", tensor.b)):
            shards = groups.shards(experts=slot.of_experts)
            shape = slot.shape(shards.rank, shards.size)
            values = torch.empty(shape, dtype=torch.float32, device=torch.cuda.current_device())
            parameter = torch.nn.Parameter(values)
            if slot.of_experts:
                # megatron-core then reduces the gradient over the ranks with the same experts
                parameter.allreduce = False  # type: ignore[attr-defined]
            else:
                # each rank computes the gradient of a replicated factor from its own tokens
                parameter.sequence_parallel = config.sequence_parallel and slot.axis is None  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)

    def forward(self) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        """A and B; parameters that are gathered after an update are read through a call of their module."""
        return self.lora_A, self.lora_B

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LowRankFactors:
        kept = [(factor, factor.data) for factor in (self.lora_A, self.lora_B)]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for factor, values in kept:
            factor.data = values.to(factor.device)
        return self


class _Adapters(torch.nn.ModuleDict):
    """The factors of every adapted projection in one weight.

    Args:
        config: See :func:`~mindspeed_simpo.model.megatron.layers.transformer_config`.
        slot: Slot of the weight.
        tensors: Its adapted projections.
        adapters: Their scale and dropout.
        groups: Process groups of the layout.
    """

    def __init__(
        self,
        config: TransformerConfig,
        slot: Slot,
        tensors: Sequence[AdaptedTensor],
        adapters: Adapters,
        groups: Groups,
    ) -> None:
        super().__init__({tensor.module: LowRankFactors(config, tensor, groups) for tensor in tensors})
        self.active = True
        """False computes the layer without its adapters."""
        self.token_keys: TokenKeys | None = None
        """Keys of the tokens of the current call, see :func:`dropping`; None without dropout."""
        self._scale, self._axis = adapters.scale, slot.axis
        self._sequence_parallel = config.sequence_parallel
        self._group: Any = groups.expert_tensor if slot.of_experts else groups.tensor
        modules = {tensor.weight: tensor.module for tensor in tensors}
        part = slot.stacked[0] if slot.of_experts else slot
        size = slot.tensor_ranks if slot.of_experts else groups.tensor.size()
        rank = groups.shards(experts=slot.of_experts).rank % size
        spans = spans_by_weight(part, rank, size) if slot.axis == 0 else ()
        rows = ((modules.get(weight), span.length) for weight, span in spans)
        self._places = [(name, sum(length for _, length in some)) for name, some in groupby(rows, lambda row: row[0])]
        """Of a column-parallel weight: (projection, or None without an adapter; rows) of its output, in order."""
        if adapters.dropout:
            whole = Span(None, 0, tensors[0].weight.shape[1])
            inputs = part.spans(rank, size) if slot.axis == 1 else (whole,)
            features = torch.cat([torch.arange(span.start, span.stop) for span in inputs])
            device = torch.cuda.current_device()
            self._dropout = InputDropout(adapters.dropout, feature_keys(features).to(device))
            self._words = [_words(tensor, groups).to(device) for tensor in tensors]

    def dropped(
        self, multiply: Multiply, rows: Tensor, factors: Sequence[Tensor], keys: Tensor, counts: Tensor | None = None
    ) -> Tensor:
        """``multiply(dropout(rows), A)`` for each projection, which has masks of its own, side by side.

        Args:
            multiply: The product.
            rows: Inputs.
            factors: The factor A of each projection.
            keys: Key of the token of each row.
            counts: Number of rows of each expert; None for one projection of all rows.
        """
        products = []
        for factor, words in zip(factors, self._words, strict=True):
            of_rows = words if counts is None else words.repeat_interleave(counts, output_size=len(keys))
            products.append(self._dropout.product(multiply, rows, factor, mixed(keys ^ of_rows)))
        return torch.cat(products, dim=-1) / (1 - self._dropout.rate)

    def factors(self) -> tuple[list[Tensor], list[Tensor]]:
        """The factors A and the factors B of the projections, in the order of the keys."""
        a, b = zip(*(factors() for factors in self.values()), strict=True)
        return list(a), list(b)

    def placed(self, products: Sequence[Tensor]) -> Tensor:
        """The products, in the order of the keys, as in the output of the weight; zeros for what has no adapter."""
        if len(self._places) <= 1:
            return products[0]
        named = dict(zip(self.keys(), products, strict=True))
        rows = {name: [number for module, number in self._places if module == name] for name in named}
        pieces = {name: iter(torch.split(product, rows[name], dim=-1)) for name, product in named.items()}
        zeros = products[0].new_zeros(()).expand(*products[0].shape[:-1], 1)
        placed = [
            zeros.expand(*zeros.shape[:-1], number) if name is None else next(pieces[name])
            for name, number in self._places
        ]
        return torch.cat(placed, dim=-1)


class LinearAdapters(_Adapters):
    """``alpha / r B A x`` of every adapted projection in one weight, placed as in the weight's output.

    Of a column-parallel weight, A is replicated and B is sharded along its rows. Without sequence parallelism the
    backward sums ``dL/d(A x)`` over the ranks; with it, ``A x`` is all-gathered along the sequence, and the gradient of
    A is summed over the ranks with those of the norms. Of a row-parallel weight, A is sharded along its columns, B is
    replicated, and the ranks' ``A x`` are summed before the product with B. Only tensors of r values a token are
    communicated. Of a replicated weight both are replicated and nothing is communicated: the gradient of its output is
    whole on every rank, or with sequence parallelism that of the rank's tokens.
    """

    def forward(self, hidden: Float[Tensor, "held row inputs"]) -> Float[Tensor, "seq row outputs"]:
        """What the adapters add to the output of the layer, before its bias.

        Args:
            hidden: Input of the layer.
        """
        a, b = self.factors()
        if self.token_keys is None:
            inner = _linear(hidden, torch.cat(a) if len(a) > 1 else a[0])
        else:
            keys = self.token_keys.whole if self._axis == 1 else self.token_keys.held
            inner = self.dropped(_linear, hidden, a, keys)
        inner = self._communicate(inner) * self._scale
        parts = zip(inner.chunk(len(b), dim=-1), b, strict=True)
        return self.placed([_linear(part, each) for part, each in parts])

    def _communicate(self, inner: Tensor) -> Tensor:
        if self._axis is None:
            return inner
        if self._axis == 1:
            return (scatter_sums_along_first if self._sequence_parallel else sum_over)(inner, self._group)
        return (gather_along_first if self._sequence_parallel else copy_to)(inner, self._group)


class ExpertAdapters(_Adapters):
    """``alpha / r B_e A_e x`` of every adapted projection of the experts e in one stacked weight.

    Expert-tensor ranks, which have copies of the same rows and whose outputs are summed later, shard A or B as they
    shard the weight and each have all of the other. No row is communicated: the backward sums the gradient of the
    factor that each has over these ranks.
    """

    def forward(
        self,
        rows: Float[Tensor, "row inputs"],
        counts: Int[Tensor, " expert"],
        keys: Int[Tensor, "row one"] | None = None,
    ) -> Float[Tensor, "row outputs"]:
        """What the adapters add to the experts' products.

        Args:
            rows: Input of the experts, expert by expert.
            counts: int64 number of rows of each expert of this rank.
            keys: Key of the token of each row; None without dropout.
        """
        a, b = self.factors()
        if self._axis == 1:
            b = [copy_to(each, self._group) for each in b]
        else:
            a = [copy_to(each, self._group) for each in a]
        multiply = partial(_grouped_linear, counts)
        if keys is None:
            inner = multiply(rows, torch.cat(a, dim=1) if len(a) > 1 else a[0])
        else:
            inner = self.dropped(multiply, rows, a, keys[:, 0], counts)
        parts = zip((inner * self._scale).chunk(len(b), dim=-1), b, strict=True)
        return self.placed([multiply(part, each) for part, each in parts])


def _linear(rows: Tensor, factor: Tensor) -> Tensor:
    return linear(rows, factor.to(rows.dtype))


def _grouped_linear(counts: Tensor, rows: Tensor, factors: Tensor) -> Tensor:
    return grouped_linear(rows, factors.to(rows.dtype), counts)


def _words(tensor: AdaptedTensor, groups: Groups) -> Int[Tensor, " projection"]:
    """:func:`projection_word` of the projection, or of that of each expert of this rank."""
    shards = groups.shards(experts=tensor.a.of_experts)
    held = [[span.tensor for span in block if span.tensor] for block in tensor.a.blocks(shards.rank, shards.size)]
    return torch.tensor([projection_word(first.name.removesuffix(".lora_A.weight")) for first, *_ in held])


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
            path, _, name = place_of(slot).rpartition(".")
            kind = ExpertAdapters if slot.of_experts else LinearAdapters
            setattr(model.get_submodule(path), name, kind(config, slot, tensors, adapters, groups))
            found += chain.from_iterable((tensor.a, tensor.b) for tensor in tensors)
    return found


@contextmanager
def dropping(layer: torch.nn.Module, keys: TokenKeys | None) -> Iterator[None]:
    """Drop inputs of the layer's adapters inside of the context, which is one call of the layer.

    Args:
        layer: The layer.
        keys: Keys of its tokens; None drops nothing.
    """
    present = [] if keys is None else [part for part in layer.modules() if isinstance(part, _Adapters)]
    for part in present:
        part.token_keys = keys
    try:
        yield
    finally:
        for part in present:
            part.token_keys = None


@contextmanager
def without_adapters(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Compute the models without their adapters inside of the context.

    Args:
        models: Model chunks, wrapped or not.
    """
    present = [part for model in models for part in model.modules() if isinstance(part, _Adapters)]
    for part in present:
        part.active = False
    try:
        yield
    finally:
        for part in present:
            part.active = True
