"""The one table that says which Hugging Face tensors each megatron-core parameter is made of.

Import, export, random initialisation and the tests all follow it. Tensor parallelism divides a Hugging Face tensor
along one axis; a rank's slices are then fused into its parameter, so no rank needs more than its own slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mindspeed_simpo.model.description import ModelSpec

Fusion = Literal["none", "qkv", "gate_up"]
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class HFTensor:
    """A tensor of the Hugging Face checkpoint; ``axis`` is divided over the tensor-parallel ranks, None for a copy."""

    name: str
    shape: tuple[int, ...]
    axis: int | None = None

    def range(self, rank: int, size: int) -> tuple[int, int]:
        """Start and stop along ``axis`` of one rank's slice; the last ranks' are shorter where it does not divide."""
        assert self.axis is not None
        length = self.shape[self.axis]
        per_rank = -(-length // size)
        return min(rank * per_rank, length), min((rank + 1) * per_rank, length)


@dataclass(frozen=True)
class Slot:
    """One parameter of a ``PolicyModel`` and the tensors that it holds slices of."""

    parameter: str
    tensors: tuple[HFTensor, ...]
    fusion: Fusion = "none"
    replica: bool = False
    """A second copy of a tensor that another stage holds (the tied head of the last pipeline stage)."""

    def fuse(self, slices: Sequence[Tensor], spec: ModelSpec) -> Tensor:
        """One rank's slices, in the order of ``tensors``, as its parameter.

        ``qkv`` interleaves by key-value group: the group's queries, its key, its value; ``gate_up`` concatenates.
        """
        if self.fusion == "none":
            return slices[0]
        if self.fusion == "gate_up":
            return torch.cat(list(slices))
        rest = slices[0].shape[1:]
        groups = slices[1].shape[0] // spec.head_dim
        heads = [part.reshape(groups, -1, spec.head_dim, *rest) for part in slices]
        return torch.cat(heads, dim=1).reshape(-1, *rest)

    def unfuse(self, parameter: Tensor, spec: ModelSpec) -> list[Tensor]:
        """Inverse of :meth:`fuse`."""
        if self.fusion == "none":
            return [parameter]
        if self.fusion == "gate_up":
            return list(parameter.chunk(2))
        rest = parameter.shape[1:]
        queries = spec.num_heads // spec.num_kv_heads
        heads = torch.split(parameter.reshape(-1, queries + 2, spec.head_dim, *rest), [queries, 1, 1], dim=1)
        return [part.reshape(-1, *rest) for part in heads]


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers that one rank runs in one piece: a pipeline stage, or one of its virtual stages."""

    stage: int
    virtual_stage: int
    first_layer: int
    num_layers: int
    has_embedding: bool
    has_head: bool

    def slots(self, spec: ModelSpec) -> Iterator[Slot]:
        """The parameters of this chunk, in the order of a Hugging Face checkpoint."""
        if self.has_embedding:
            yield Slot("embedding.word_embeddings.weight", (_vocabulary(spec, _EMBEDDING),))
        for layer in range(self.num_layers):
            yield from _layer_slots(spec, self.first_layer + layer, f"decoder.layers.{layer}.")
        if self.has_head:
            yield _copy("decoder.final_layernorm.weight", "model.norm.weight", spec.hidden_size)
            if not spec.tied:
                yield Slot("output_layer.weight", (_vocabulary(spec, "lm_head.weight"),))
            elif not self.has_embedding:
                yield Slot("output_layer.weight", (_vocabulary(spec, _EMBEDDING),), replica=True)


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


def pipeline_chunks(spec: ModelSpec, num_stages: int, num_virtual_stages: int = 1) -> list[Chunk]:
    """The chunks of all pipeline stages, in the order of the layers: virtual stages visit every rank in turn."""
    if num_virtual_stages > 1:
        sizes = [spec.num_layers // (num_stages * num_virtual_stages)] * (num_stages * num_virtual_stages)
    else:
        sizes = layers_by_stage(spec.num_layers, num_stages)
    chunks, first = [], 0
    for index, size in enumerate(sizes):
        virtual_stage, stage = divmod(index, num_stages)
        chunks.append(Chunk(stage, virtual_stage, first, size, index == 0, index == len(sizes) - 1))
        first += size
    return chunks


def hf_tensors(spec: ModelSpec) -> list[HFTensor]:
    """Every tensor of the model's Hugging Face checkpoint, layer by layer; a tied head is not stored."""
    (whole,) = pipeline_chunks(spec, 1)
    return [tensor for slot in whole.slots(spec) for tensor in slot.tensors]


def _vocabulary(spec: ModelSpec, name: str) -> HFTensor:
    return HFTensor(name, (spec.vocab_size, spec.hidden_size), axis=0)


def _copy(parameter: str, name: str, *shape: int) -> Slot:
    return Slot(parameter, (HFTensor(name, shape),))


def _column(
    parameter: str, names: Sequence[str], rows: Sequence[int], inputs: int, *, bias: bool, fusion: Fusion
) -> list[Slot]:
    weights = tuple(HFTensor(f"{name}.weight", (size, inputs), axis=0) for name, size in zip(names, rows, strict=True))
    slots = [Slot(f"{parameter}.weight", weights, fusion)]
    if bias:
        biases = tuple(HFTensor(f"{name}.bias", (size,), axis=0) for name, size in zip(names, rows, strict=True))
        slots.append(Slot(f"{parameter}.bias", biases, fusion))
    return slots


def _row(parameter: str, name: str, rows: int, inputs: int, *, bias: bool) -> list[Slot]:
    slots = [Slot(f"{parameter}.weight", (HFTensor(f"{name}.weight", (rows, inputs), axis=1),))]
    return [*slots, _copy(f"{parameter}.bias", f"{name}.bias", rows)] if bias else slots


def _layer_slots(spec: ModelSpec, layer: int, prefix: str) -> Iterator[Slot]:
    hf = f"model.layers.{layer}"
    hidden, head = spec.hidden_size, spec.head_dim
    queries, keys = spec.num_heads * head, spec.num_kv_heads * head
    attention = f"{prefix}self_attention"
    yield _copy(f"{prefix}input_layernorm.weight", f"{hf}.input_layernorm.weight", hidden)
    qkv = [f"{hf}.self_attn.{name}_proj" for name in "qkv"]
    yield from _column(f"{attention}.linear_qkv", qkv, [queries, keys, keys], hidden, bias=spec.qkv_bias, fusion="qkv")
    if spec.qk_norm:
        yield _copy(f"{attention}.q_layernorm.weight", f"{hf}.self_attn.q_norm.weight", head)
        yield _copy(f"{attention}.k_layernorm.weight", f"{hf}.self_attn.k_norm.weight", head)
    yield from _row(f"{attention}.linear_proj", f"{hf}.self_attn.o_proj", hidden, queries, bias=spec.o_bias)
    yield _copy(f"{prefix}pre_mlp_layernorm.weight", f"{hf}.post_attention_layernorm.weight", hidden)
    gate_up = [f"{hf}.mlp.{name}_proj" for name in ("gate", "up")]
    yield from _column(
        f"{prefix}mlp.linear_fc1", gate_up, [spec.ffn_size] * 2, hidden, bias=spec.mlp_bias, fusion="gate_up"
    )
    yield from _row(f"{prefix}mlp.linear_fc2", f"{hf}.mlp.down_proj", hidden, spec.ffn_size, bias=spec.mlp_bias)
