"""Seconds of the forward and backward of layers, embedding and output layer on one rank, from shapes and rates."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.model.adapters import Adapters
from mindspeed_simpo.model.description import Attention, Layer, ModelDescription
from mindspeed_simpo.model.naming import Chunk
from mindspeed_simpo.studies.plan.collectives import Message, Traffic, group_of, seconds
from mindspeed_simpo.studies.plan.devices import DeviceKind
from mindspeed_simpo.studies.plan.passes import Passes

PARTS = ("compute", "tensor", "context", "expert", "host", "recompute")
"""What a pass spends its seconds on: kernels, the collectives of an axis, the host, and forwards done once more."""
_PART_OF = {"tensor": 1, "shared heads": 1, "context": 2, "expert": 3}
Seconds = Float[np.ndarray, "part pass"]
_BACKWARD_ATTENTION = 2.5
"""Products of the attention's backward over those of its forward: the scores once more, and four more products."""
_FP32 = 4


@dataclass(frozen=True)
class Products:
    """The weight matrices of a layer on one rank, ``(outputs, inputs)``."""

    sharded: tuple[tuple[int, ...], ...]
    """Multiplied by all tokens of a context-parallel rank."""
    whole: tuple[tuple[int, ...], ...]
    """Held by every tensor-parallel rank; multiplied by the rank's shard of the sequence."""
    experts: tuple[tuple[int, ...], ...]
    """Number of experts on the rank, outputs and inputs; multiplied by the rows of the experts."""


@functools.lru_cache(maxsize=1024)
def products_of(model: ModelDescription, layer: Layer, layout_ranks: tuple[int, int, int]) -> Products:
    """The matrices of a layer, from the slots of its parameters.

    Args:
        model: The description.
        layer: One of its layers.
        layout_ranks: Tensor ranks, expert ranks and expert-tensor ranks.
    """
    tensor, expert, expert_tensor = layout_ranks
    chunk = Chunk(0, 0, model.first_of_kind[layer], 1, False, False, expert_tensor)
    sharded: list[tuple[int, ...]] = []
    whole: list[tuple[int, ...]] = []
    experts: list[tuple[int, ...]] = []
    for slot in chunk.slots(model):
        shape = slot.shape(0, expert * expert_tensor if slot.of_experts else tensor)
        if slot.of_experts and len(shape) == 3:
            experts.append(shape)
        elif not slot.of_experts and len(shape) == 2:
            (whole if slot.divide is None else sharded).append(shape)
    return Products(tuple(sharded), tuple(whole), tuple(experts))


@dataclass(frozen=True)
class Costs:
    """Seconds of the passes of one data-parallel rank with one layout on one kind of device."""

    model: ModelDescription
    config: Config
    layout: Layout
    kind: DeviceKind
    passes: Passes

    @functools.cached_property
    def traffic(self) -> Traffic:
        """The messages of the passes."""
        return Traffic(self.model, self.config, self.layout, self.passes)

    @functools.cached_property
    def _adapters(self) -> Adapters | None:
        return Adapters.of(self.config, self.model)

    @property
    def _tokens(self) -> np.ndarray:
        return self.traffic.tokens

    @property
    def _sequence_shards(self) -> int:
        return self.layout.tensor if self.traffic.sequence_parallel else 1

    def product(self, rows: np.ndarray, outputs: int, inputs: int, number: int = 1) -> np.ndarray:
        """Seconds of ``rows x inputs`` times the transpose of ``outputs x inputs``, once for each of ``number``.

        Args:
            rows: Rows over all of ``number`` products.
            outputs: Of a product.
            inputs: Of a product.
            number: Products in one call, such as experts.
        """
        operations = 2.0 * rows * outputs * inputs
        moved = self.traffic.width * (rows * (outputs + inputs) + float(number) * outputs * inputs)
        device = np.maximum(
            operations / self.kind.matmul_flops(bf16=self.config.bf16_in_use), moved / self.kind.memory_bytes_per_s
        )
        return device + self.kind.operator_s

    def layer(self, layer: Layer) -> tuple[Seconds, Seconds, Seconds]:
        """Device seconds of a layer: its forward, its backward, and the core of its attention's forward."""
        products, weights = self._products(layer)
        core, values = self.attention(layer.attention), self._values(layer)
        backward = (1 if self._adapters is not None else 2) * products + 2 * self._adapter_seconds(layer)
        # gradients of weights are added to those of the step, in fp32
        trained = 0 if self._adapters is not None else weights
        backward += (_BACKWARD_ATTENTION * core) + 2 * values + 2 * _FP32 * trained / self.kind.memory_bytes_per_s
        forward = products + self._adapter_seconds(layer) + core + values
        messages = self.traffic.forward(layer), self.traffic.backward(layer)
        return (
            self._with_messages(forward, messages[0]),
            self._with_messages(backward, messages[1]),
            self._with_messages(core, [each for each in messages[0] if each.axis == "context"]),
        )

    def _with_messages(self, compute: np.ndarray, messages: list[Message]) -> Seconds:
        found = np.zeros((len(PARTS), self.passes.number))
        found[0] = compute
        for kind, axis, size, calls in messages:
            group = group_of(axis, self.layout, self.kind, self._sharing_ranks)
            found[_PART_OF[axis]] += seconds(kind, size, group, self.kind, calls)
        return found

    def _products(self, layer: Layer) -> tuple[np.ndarray, float]:
        """Seconds of the products of the forward, and the number of weights."""
        layout = self.layout
        ranks = layout.tensor, layout.expert, layout.expert_tensor_ranks
        found, total, weights = products_of(self.model, layer, ranks), np.zeros(self.passes.number), 0.0
        for outputs, inputs in found.sharded:
            total += self.product(self._tokens, outputs, inputs)
            weights += outputs * inputs
        for outputs, inputs in found.whole:
            total += self.product(self._tokens / self._sequence_shards, outputs, inputs)
            weights += outputs * inputs
        for number, outputs, inputs in found.experts:
            total += self.product(self.expert_rows(layer), outputs, inputs, number)
            weights += float(number) * outputs * inputs
        return total, weights

    def expert_rows(self, layer: Layer) -> np.ndarray:
        """Rows that the experts of a rank compute, with equally many for each expert."""
        assert layer.experts is not None, "the layer has experts"
        return self._tokens / self.layout.tensor * self.layout.expert_tensor_ranks * layer.experts.top_k

    def _adapter_seconds(self, layer: Layer) -> np.ndarray:
        """Seconds of the products of the adapters' factors in a forward; a backward has twice as many."""
        if self._adapters is None:
            return np.zeros(self.passes.number)
        layout = self.layout
        part = [Chunk(0, 0, self.model.first_of_kind[layer], 1, False, False, layout.expert_tensor_ranks)]
        dense = self._adapters.count(self.model, part, layout.tensor, experts=False)
        operations = 2.0 * dense * self._tokens
        if layer.experts is not None:
            ranks = layout.expert * layout.expert_tensor_ranks
            held = layer.experts.number // layout.expert
            of_one = self._adapters.count(self.model, part, ranks, experts=True) / held
            operations = operations + 2.0 * of_one * self.expert_rows(layer)
        # two products for each adapted projection
        calls = 2 * len(self._adapters.modules) * self.kind.operator_s
        return operations / self.kind.matmul_flops(bf16=False) + calls

    def attention(self, attention: Attention) -> np.ndarray:
        """Seconds of the attention's forward between its projections."""
        share = attention.share(0, self.layout.tensor)
        pairs = self.passes.attended[attention.window] / self.layout.context
        operations = 2.0 * pairs * share.queries * (attention.head_dim + attention.value_dim)
        calls = self.passes.documents if self.kind.device == "cpu" else self.passes.calls
        copied = self.passes.prefixes * share.kv_heads * (attention.head_dim + attention.value_dim)
        return (
            operations / self.kind.attention_flops(bf16=self.config.bf16_in_use)
            + calls * self.kind.operator_s
            + 2 * self.traffic.width * copied / self.kind.memory_bytes_per_s
        )

    @functools.cached_property
    def _sharing_ranks(self) -> int:
        """Ranks that share a key-value head."""
        return max(layer.attention.share(0, self.layout.tensor).kv_parts for layer in self.model.first_of_kind)

    def _values(self, layer: Layer) -> np.ndarray:
        """Seconds of norms, rotation, activation, residual sums and permutations: numbers read and written."""
        attention, hidden = layer.attention, self.model.hidden_size
        share = attention.share(0, self.layout.tensor)
        norms = 2 + (layer.norm_after_attention is not None) + (layer.norm_after_mlp is not None)
        numbers = (2 * norms + 6) * hidden * self._tokens / self._sequence_shards
        rotated = (share.padded_queries + share.kv_heads) * attention.head_dim
        numbers = numbers + 4 * rotated * self._tokens * (1.5 if attention.qk_norm is not None else 1)
        if layer.mlp is not None:
            numbers = numbers + 3 * layer.mlp.width / self.layout.tensor * self._tokens
        if layer.experts is not None:
            width = layer.experts.width / self.layout.expert_tensor_ranks
            numbers = numbers + self.expert_rows(layer) * (3 * width + 8 * hidden)
        return numbers * self.traffic.width / self.kind.memory_bytes_per_s

    def embedding(self) -> tuple[Seconds, Seconds]:
        """Seconds of the embedding's forward and backward."""
        rows = -(-self.model.vocab_size // self.layout.tensor)
        read = self._tokens * self.model.hidden_size * self.traffic.width / self.kind.memory_bytes_per_s
        added = 0.0 if self._adapters is not None else rows * self.model.hidden_size * (self.traffic.width + 2 * _FP32)
        return (
            self._with_messages(3 * read, self.traffic.ends(first=True, last=False, backward=False)),
            self._with_messages(
                3 * read + added / self.kind.memory_bytes_per_s,
                self.traffic.ends(first=True, last=False, backward=True),
            ),
        )

    def head(self) -> tuple[Seconds, Seconds]:
        """Seconds of the output layer and the loss: one product forward, and in the backward two, or three if fused."""
        rows, hidden = -(-self.model.vocab_size // self.layout.tensor), self.model.hidden_size
        scored = self.passes.scored / self.layout.context
        one = self.product(scored, rows, hidden)
        logits = scored * rows * _FP32 / self.kind.memory_bytes_per_s
        # a last chunk that is not full counts by its share
        chunks = np.maximum(1.0, scored / self.config.chunk_tokens_in_use) if self.config.fused_logprob else 1.0
        products = (0 if self._adapters is not None else 1) + 1 + bool(self.config.fused_logprob)
        added = 0.0 if self._adapters is not None else chunks * 2 * _FP32 * rows * hidden / self.kind.memory_bytes_per_s
        return (
            self._with_messages(one + 5 * logits, self.traffic.ends(first=False, last=True, backward=False)),
            self._with_messages(
                products * one + 6 * logits + added, self.traffic.ends(first=False, last=True, backward=True)
            ),
        )
