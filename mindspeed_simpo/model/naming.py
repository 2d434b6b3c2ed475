"""The one table that says which Hugging Face tensors each parameter is made of, derived from the description.

Import, export, checkpoints, random initialisation and the tests all follow it. A parameter of one tensor-parallel rank
is a list of spans: rows (or columns) of Hugging Face tensors, end to end, and padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mindspeed_simpo.model.description import Attention, Layer, ModelDescription, Norm

SlotKind = Literal["base", "adapter", "expert"]
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class HFTensor:
    """A tensor of the Hugging Face checkpoint."""

    name: str
    shape: tuple[int, ...]
    axis: int | None = None
    """What the tensor-parallel ranks divide; None where each has a copy."""
    initial: float | None = None
    """Value of all elements before any training; None where they are drawn from a normal distribution."""


@dataclass(frozen=True)
class Span:
    """Elements ``start`` to ``stop`` of ``tensor`` along its axis; padding, which is zero, where there is no tensor."""

    tensor: HFTensor | None
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Elements along the axis."""
        return self.stop - self.start

    def part(self, start: int, length: int) -> Span:
        """``length`` elements of this span, from its ``start``-th on."""
        return Span(self.tensor, self.start + start, self.start + start + length)

    def holds(self, other: Span) -> bool:
        """Whether all of ``other`` is in this one; padding is in none."""
        return (
            self.tensor is not None
            and self.tensor == other.tensor
            and (self.start <= other.start and other.stop <= self.stop)
        )


@dataclass(frozen=True)
class Slot:
    """One parameter of a ``PolicyModel`` and the tensors that it holds parts of."""

    parameter: str
    tensors: tuple[HFTensor, ...]
    divide: Callable[[int, int], Sequence[Span]] | None = field(default=None, compare=False)
    """``(rank, size)`` -> what the parameter of that tensor-parallel rank holds, in order; None for a copy of a tensor
    on every rank."""
    kind: SlotKind = "base"
    replica: bool = False
    """A second copy of a tensor that another pipeline rank holds (the tied head of the last one)."""
    pads_vocabulary: bool = False
    """Whether it ends with padding where the tensor-parallel ranks do not divide the vocabulary."""

    @property
    def axis(self) -> int | None:
        """Axis of the parameter that the tensor-parallel ranks divide."""
        return self.tensors[0].axis

    def spans(self, rank: int, size: int) -> tuple[Span, ...]:
        """What the parameter of one tensor-parallel rank holds along ``axis``, in order, padding included."""
        if self.divide is None:
            return (Span(self.tensors[0], 0, self.tensors[0].shape[0]),)
        return tuple(span for span in self.divide(rank, size) if span.length)

    def shape(self, rank: int, size: int) -> tuple[int, ...]:
        """Of the parameter of one tensor-parallel rank."""
        shape = list(self.tensors[0].shape)
        shape[self.axis or 0] = sum(span.length for span in self.spans(rank, size))
        return tuple(shape)


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers that one rank runs in one piece: a pipeline stage, or one of its virtual stages."""

    stage: int
    virtual_stage: int
    first_layer: int
    num_layers: int
    has_embedding: bool
    has_head: bool

    def layers(self, model: ModelDescription) -> tuple[Layer, ...]:
        """The descriptions of its layers."""
        return model.layers[self.first_layer : self.first_layer + self.num_layers]

    def slots(self, model: ModelDescription) -> Iterator[Slot]:
        """The parameters of this chunk, in the order of a Hugging Face checkpoint."""
        if self.has_embedding:
            yield _vocabulary("embedding.word_embeddings.weight", _EMBEDDING, model)
        for index, layer in enumerate(self.layers(model)):
            hf = f"model.layers.{self.first_layer + index}."
            yield from _layer_slots(model, layer, hf, f"decoder.layers.{index}.")
        if self.has_head:
            yield _norm("decoder.final_layernorm", "model.norm", model.hidden_size, model.final_norm)
            if not model.tied:
                yield _vocabulary("output_layer.weight", "lm_head.weight", model)
            elif not self.has_embedding:
                yield _vocabulary("output_layer.weight", _EMBEDDING, model, replica=True)


def layers_by_stage(num_layers: int, num_stages: int) -> list[int]:
    """Layers of each pipeline stage; where they do not divide, the first and the last stage have fewer.

    Those two hold the embedding and the head as well, and they are the only ones that megatron-core lets differ.
    """
    middle = -(-num_layers // num_stages)
    outer = num_layers - middle * (num_stages - 2)
    if outer < 2:
        middle = num_layers // num_stages
        outer = num_layers - middle * (num_stages - 2)
    if num_stages == 1:
        return [num_layers]
    return [-(-outer // 2), *[middle] * (num_stages - 2), outer // 2]


def pipeline_chunks(model: ModelDescription, num_stages: int, num_virtual_stages: int = 1) -> list[Chunk]:
    """The chunks of all pipeline stages, in the order of the layers: virtual stages visit every rank in turn."""
    if num_virtual_stages > 1:
        sizes = [model.num_layers // (num_stages * num_virtual_stages)] * (num_stages * num_virtual_stages)
    else:
        sizes = layers_by_stage(model.num_layers, num_stages)
    chunks, first = [], 0
    for index, size in enumerate(sizes):
        virtual_stage, stage = divmod(index, num_stages)
        chunks.append(Chunk(stage, virtual_stage, first, size, index == 0, index == len(sizes) - 1))
        first += size
    return chunks


def hf_tensors(model: ModelDescription) -> list[HFTensor]:
    """Every tensor of the model's Hugging Face checkpoint, layer by layer; a tied head is not stored."""
    (whole,) = pipeline_chunks(model, 1)
    return [tensor for slot in whole.slots(model) for tensor in slot.tensors]


def joined(spans: Sequence[Span]) -> list[Span]:
    """The same elements in as few spans as possible, without padding: what is read, or stored, in one piece."""
    stored = [(span.tensor.name, span) for span in spans if span.tensor is not None]
    found: list[Span] = []
    for _, span in sorted(stored, key=lambda each: (each[0], each[1].start)):
        if found and found[-1].tensor == span.tensor and found[-1].stop == span.start:
            found[-1] = Span(span.tensor, found[-1].start, span.stop)
        else:
            found.append(span)
    return found


def _layer_slots(model: ModelDescription, layer: Layer, hf: str, prefix: str) -> Iterator[Slot]:
    names, hidden, attention, mlp = model.names, model.hidden_size, layer.attention, layer.mlp
    head = attention.head_dim
    yield _norm(f"{prefix}input_layernorm", f"{hf}{names.norm_before_attention}", hidden, layer.norm_before_attention)
    rows = [attention.heads * head, attention.kv_heads * head, attention.kv_heads * head]
    divide = functools.partial(_qkv, attention)
    qkv = [f"{hf}{name}" for name in names.qkv]
    yield from _columns(f"{prefix}self_attention.linear_qkv", qkv, rows, hidden, divide, bias=attention.qkv_bias)
    if attention.qk_norm is not None:
        yield _norm(f"{prefix}self_attention.q_layernorm", f"{hf}{names.q_norm}", head, attention.qk_norm)
        yield _norm(f"{prefix}self_attention.k_layernorm", f"{hf}{names.k_norm}", head, attention.qk_norm)
    heads = functools.partial(_heads, attention)
    yield from _rows(
        f"{prefix}self_attention.linear_proj", f"{hf}{names.o}", hidden, rows[0], heads, bias=attention.o_bias
    )
    if layer.norm_after_attention is not None:
        name = f"{hf}{names.norm_after_attention}"
        yield _norm(f"{prefix}post_attention_layernorm", name, hidden, layer.norm_after_attention)
    yield _norm(f"{prefix}pre_mlp_layernorm", f"{hf}{names.norm_before_mlp}", hidden, layer.norm_before_mlp)
    gate_up = [f"{hf}{name}" for name in names.gate_up]
    yield from _columns(f"{prefix}mlp.linear_fc1", gate_up, [mlp.width] * 2, hidden, _evenly, bias=mlp.bias)
    yield from _rows(f"{prefix}mlp.linear_fc2", f"{hf}{names.down}", hidden, mlp.width, _evenly, bias=mlp.bias)
    if layer.norm_after_mlp is not None:
        yield _norm(f"{prefix}post_mlp_layernorm", f"{hf}{names.norm_after_mlp}", hidden, layer.norm_after_mlp)


def _vocabulary(parameter: str, name: str, model: ModelDescription, *, replica: bool = False) -> Slot:
    tensor = HFTensor(name, (model.vocab_size, model.hidden_size), axis=0)

    def divide(rank: int, size: int) -> Sequence[Span]:
        rows = model.padded_vocab_size(size) // size
        start, stop = (min(number * rows, model.vocab_size) for number in (rank, rank + 1))
        return Span(tensor, start, stop), Span(None, 0, rows - (stop - start))

    return Slot(parameter, (tensor,), divide, replica=replica, pads_vocabulary=True)


def _norm(parameter: str, name: str, size: int, norm: Norm) -> Slot:
    return Slot(f"{parameter}.weight", (HFTensor(f"{name}.weight", (size,), initial=1.0 - norm.weight_offset),))


_Divide = Callable[[Sequence[Span], int, int], Sequence[Span]]


def _columns(
    parameter: str, names: Sequence[str], rows: Sequence[int], inputs: int, divide: _Divide, *, bias: bool
) -> Iterator[Slot]:
    """Projections of one input to ``rows`` outputs each; stored apart, or end to end under one name."""
    for suffix, rest in (("weight", (inputs,)), ("bias", ())):
        if suffix == "bias" and not bias:
            continue
        initial = 0.0 if suffix == "bias" else None
        sizes = rows if len(names) == len(rows) else [sum(rows)]
        tensors = tuple(
            HFTensor(f"{name}.{suffix}", (size, *rest), axis=0, initial=initial)
            for name, size in zip(names, sizes, strict=True)
        )
        if len(tensors) == len(rows):
            spans = [Span(tensor, 0, tensor.shape[0]) for tensor in tensors]
        else:
            starts = [sum(rows[:index]) for index in range(len(rows))]
            spans = [Span(tensors[0], start, start + size) for start, size in zip(starts, rows, strict=True)]
        yield Slot(f"{parameter}.{suffix}", tensors, functools.partial(divide, spans))


def _rows(parameter: str, name: str, outputs: int, inputs: int, divide: _Divide, *, bias: bool) -> Iterator[Slot]:
    tensor = HFTensor(f"{name}.weight", (outputs, inputs), axis=1)
    yield Slot(f"{parameter}.weight", (tensor,), functools.partial(divide, [Span(tensor, 0, inputs)]))
    if bias:
        yield Slot(f"{parameter}.bias", (HFTensor(f"{name}.bias", (outputs,), initial=0.0),))


def _evenly(whole: Sequence[Span], rank: int, size: int) -> Sequence[Span]:
    """An equal share of each span, one after the other."""
    return [span.part(rank * (span.length // size), span.length // size) for span in whole]


def _heads(attention: Attention, whole: Sequence[Span], rank: int, size: int) -> Sequence[Span]:
    """The rank's query heads, then padding."""
    share, head = attention.share(rank, size), attention.head_dim
    padding = (share.padded_queries - share.queries) * head
    return whole[0].part(share.first_query * head, share.queries * head), Span(None, 0, padding)


def _qkv(attention: Attention, whole: Sequence[Span], rank: int, size: int) -> Sequence[Span]:
    """For each key-value head of the rank: its queries, padding, its key, its value.

    Ranks that share a key-value head hold equally many rows of its key and of its value each.
    """
    query, key, value = whole
    share, head = attention.share(rank, size), attention.head_dim
    rows = head // share.kv_parts
    group, padded = share.queries // share.kv_heads, share.padded_queries // share.kv_heads
    spans: list[Span] = []
    for index in range(share.kv_heads):
        first = (share.first_kv + index) * head + share.kv_part * rows
        spans += [
            query.part((share.first_query + index * group) * head, group * head),
            Span(None, 0, (padded - group) * head),
            key.part(first, rows),
            value.part(first, rows),
        ]
    return spans
