"""The mapping between parameters and Hugging Face tensors, derived from the description of the model.

Import, export, checkpoints, random initialisation and the tests use this mapping; ``model/slots.py`` has its records.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from mindspeed_simpo.model.description import Attention, Layer, ModelDescription, Norm
from mindspeed_simpo.model.expert_naming import expert_slots
from mindspeed_simpo.model.slots import HFTensor, Slot, Span, evenly

_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Chunk:
    """A model chunk: consecutive layers of one pipeline rank.

    A pipeline rank has one chunk, or one for each virtual pipeline rank under the interleaved schedule.
    """

    pipeline_rank: int
    virtual_pipeline_rank: int
    first_layer: int
    num_layers: int
    has_embedding: bool
    has_head: bool
    expert_tensor_ranks: int = 1
    """Ranks that divide each expert."""

    def layers(self, model: ModelDescription) -> tuple[Layer, ...]:
        """The descriptions of the layers of this chunk."""
        return model.layers[self.first_layer : self.first_layer + self.num_layers]

    def slots(self, model: ModelDescription) -> Iterator[Slot]:
        """The parameters of this chunk, in the order of a Hugging Face checkpoint."""
        if self.has_embedding:
            yield _vocabulary("embedding.word_embeddings.weight", _EMBEDDING, model)
        for index, layer in enumerate(self.layers(model)):
            hf = f"model.layers.{self.first_layer + index}."
            yield from _layer_slots(model, layer, hf, f"decoder.layers.{index}.", self.expert_tensor_ranks)
        if self.has_head:
            yield _norm("decoder.final_layernorm", "model.norm", model.hidden_size, model.final_norm)
            if not model.tied:
                yield _vocabulary("output_layer.weight", "lm_head.weight", model)
            elif not self.has_embedding:
                yield _vocabulary("output_layer.weight", _EMBEDDING, model, replica=True)


def distinct_parts(model: ModelDescription, chunks: Iterable[Chunk]) -> Counter[Chunk]:
    """How often each part occurs in some chunks: what is beside the layers, and one layer of each kind.

    A part is a chunk; for counting parameters, which need not be named one by one.
    """
    found: Counter[Chunk] = Counter()
    for chunk in chunks:
        found[dataclasses.replace(chunk, pipeline_rank=0, virtual_pipeline_rank=0, first_layer=0, num_layers=0)] += 1
        for layer, number in Counter(chunk.layers(model)).items():
            found[Chunk(0, 0, model.first_of_kind[layer], 1, False, False, chunk.expert_tensor_ranks)] += number
    return found


def layers_per_pipeline_rank(num_layers: int, pipeline_size: int) -> list[int]:
    """Number of layers of each pipeline rank.

    Where ``pipeline_size`` does not divide ``num_layers``, the first and the last rank differ from the others, with
    fewer layers where possible: these ranks also hold the embedding and the head, and megatron-core allows another
    number of layers on these ranks only.
    """
    middle = -(-num_layers // pipeline_size)
    outer = num_layers - middle * (pipeline_size - 2)
    if outer < 2:
        middle = num_layers // pipeline_size
        outer = num_layers - middle * (pipeline_size - 2)
    if pipeline_size == 1:
        return [num_layers]
    return [-(-outer // 2), *[middle] * (pipeline_size - 2), outer // 2]


def pipeline_chunks(
    model: ModelDescription, pipeline_size: int, virtual_pipeline_size: int = 1, expert_tensor_ranks: int = 1
) -> list[Chunk]:
    """The chunks of all pipeline ranks, in the order of the layers; chunk ``i`` is on rank ``i % pipeline_size``.

    Args:
        model: Description of the whole model.
        pipeline_size: Number of pipeline ranks, at most the number of layers.
        virtual_pipeline_size: Number of chunks per pipeline rank.
        expert_tensor_ranks: Number of ranks that divide each expert.
    """
    if virtual_pipeline_size > 1:
        number = pipeline_size * virtual_pipeline_size
        sizes = [model.num_layers // number] * number
    else:
        sizes = layers_per_pipeline_rank(model.num_layers, pipeline_size)
    chunks, first = [], 0
    for index, size in enumerate(sizes):
        virtual_rank, rank = divmod(index, pipeline_size)
        chunks.append(Chunk(rank, virtual_rank, first, size, index == 0, index == len(sizes) - 1, expert_tensor_ranks))
        first += size
    return chunks


def hf_tensors(model: ModelDescription) -> list[HFTensor]:
    """Every tensor of the model's Hugging Face checkpoint, layer by layer; without a tied output layer.

    Of tensors that hold all experts of a layer, the part of each expert.
    """
    (whole,) = pipeline_chunks(model, 1)
    return [tensor for slot in whole.slots(model) for tensor in slot.tensors]


def stored_shapes(model: ModelDescription) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the files of the model's Hugging Face checkpoint, not quantized."""
    stored = (tensor.place or tensor for tensor in hf_tensors(model))
    return {each.name: each.shape for each in stored}


def _layer_slots(
    model: ModelDescription, layer: Layer, hf: str, prefix: str, expert_tensor_ranks: int
) -> Iterator[Slot]:
    names, hidden = model.names, model.hidden_size
    yield _norm(f"{prefix}input_layernorm", f"{hf}{names.norm_before_attention}", hidden, layer.norm_before_attention)
    attention_slots = _attention_slots if layer.attention.latent is None else _latent_attention_slots
    yield from attention_slots(model, layer.attention, hf, f"{prefix}self_attention.")
    if layer.norm_after_attention is not None:
        name = f"{hf}{names.norm_after_attention}"
        yield _norm(f"{prefix}post_attention_layernorm", name, hidden, layer.norm_after_attention)
    yield _norm(f"{prefix}pre_mlp_layernorm", f"{hf}{names.norm_before_mlp}", hidden, layer.norm_before_mlp)
    if layer.mlp is not None:
        shared = layer.experts is not None
        width, bias = layer.mlp.width, layer.mlp.bias
        gate_up = [f"{hf}{name}" for name in (names.shared_gate_up if shared else names.gate_up)]
        down = f"{hf}{names.shared_down if shared else names.down}"
        yield from _columns(f"{prefix}mlp.linear_fc1", gate_up, [width] * 2, hidden, evenly, bias=bias)
        yield from _rows(f"{prefix}mlp.linear_fc2", down, hidden, width, evenly, bias=bias)
    if layer.experts is not None:
        yield from expert_slots(model, layer.experts, hf, f"{prefix}experts.", expert_tensor_ranks)
    if layer.norm_after_mlp is not None:
        yield _norm(f"{prefix}post_mlp_layernorm", f"{hf}{names.norm_after_mlp}", hidden, layer.norm_after_mlp)


def _attention_slots(model: ModelDescription, attention: Attention, hf: str, prefix: str) -> Iterator[Slot]:
    names, hidden, head = model.names, model.hidden_size, attention.head_dim
    rows = [attention.heads * head, attention.kv_heads * head, attention.kv_heads * head]
    divide = functools.partial(_qkv, attention)
    qkv = [f"{hf}{name}" for name in names.qkv]
    yield from _columns(f"{prefix}linear_qkv", qkv, rows, hidden, divide, bias=attention.qkv_bias)
    if attention.qk_norm is not None:
        yield _norm(f"{prefix}q_layernorm", f"{hf}{names.q_norm}", head, attention.qk_norm)
        yield _norm(f"{prefix}k_layernorm", f"{hf}{names.k_norm}", head, attention.qk_norm)
    if attention.sinks:
        sinks = HFTensor(f"{hf}{names.sinks}", (attention.heads,), axis=0)
        divide = functools.partial(_heads, attention, 1, [Span(sinks, 0, attention.heads)])
        yield Slot(f"{prefix}sinks", (sinks,), divide)
    heads = functools.partial(_heads, attention, head)
    yield from _rows(f"{prefix}linear_proj", f"{hf}{names.o}", hidden, rows[0], heads, bias=attention.o_bias)


def _latent_attention_slots(model: ModelDescription, attention: Attention, hf: str, prefix: str) -> Iterator[Slot]:
    names, hidden, latent = model.names, model.hidden_size, attention.latent
    assert latent is not None
    rotated = attention.rotation.dims
    rows, divide = [attention.heads * attention.head_dim], functools.partial(_rotated_first, attention)
    if latent.query_rank is None:
        yield from _columns(f"{prefix}linear_q", [f"{hf}{names.q}"], rows, hidden, divide, bias=False)
    else:
        query_rank = latent.query_rank
        yield from _replicated(f"{prefix}q_latent", f"{hf}{names.q_latent}", query_rank, hidden, bias=latent.bias)
        yield _norm(f"{prefix}q_latent_norm", f"{hf}{names.q_latent_norm}", query_rank, latent.norm)
        yield from _columns(f"{prefix}linear_q", [f"{hf}{names.q_from_latent}"], rows, query_rank, divide, bias=False)
    name = f"{hf}{names.kv_latent}"
    yield from _replicated(f"{prefix}kv_latent", name, latent.kv_rank + rotated, hidden, bias=latent.bias)
    yield _norm(f"{prefix}kv_latent_norm", f"{hf}{names.kv_latent_norm}", latent.kv_rank, latent.norm)
    rows = [attention.heads * (attention.head_dim - rotated + latent.value_dim)]
    name = f"{hf}{names.kv_from_latent}"
    yield from _columns(f"{prefix}linear_kv", [name], rows, latent.kv_rank, evenly, bias=False)
    name, values = f"{hf}{names.o}", attention.heads * latent.value_dim
    yield from _rows(f"{prefix}linear_proj", name, hidden, values, evenly, bias=attention.o_bias)


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
    """The slots of column-parallel projections to ``rows`` outputs each, stored as one tensor each or concatenated."""
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


def _replicated(parameter: str, name: str, outputs: int, inputs: int, *, bias: bool) -> Iterator[Slot]:
    """The slots of a projection that every tensor-parallel rank has whole."""
    yield Slot(f"{parameter}.weight", (HFTensor(f"{name}.weight", (outputs, inputs)),))
    if bias:
        yield Slot(f"{parameter}.bias", (HFTensor(f"{name}.bias", (outputs,), initial=0.0),))


def _heads(attention: Attention, head: int, whole: Sequence[Span], rank: int, size: int) -> Sequence[Span]:
    """The rank's query heads, of ``head`` elements each, then padding."""
    share = attention.share(rank, size)
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


def _rotated_first(attention: Attention, whole: Sequence[Span], rank: int, size: int) -> Sequence[Span]:
    """The rank's query heads, of each head first the rotated elements, which are stored last."""
    head, rotated = attention.head_dim, attention.rotation.dims
    share = attention.share(rank, size)
    starts = [(share.first_query + index) * head for index in range(share.queries)]
    parts = [(start + head - rotated, rotated, start, head - rotated) for start in starts]
    spans = [(whole[0].part(first, turned), whole[0].part(start, kept)) for first, turned, start, kept in parts]
    return [span for pair in spans for span in pair]
