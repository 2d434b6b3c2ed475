"""The memory of a pass that adapters add or save, from shapes alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.model.adapters import Adapters
from mindspeed_simpo.model.description import Layer, ModelDescription
from mindspeed_simpo.model.dropout import ELEMENTS
from mindspeed_simpo.model.naming import Chunk


@dataclass(frozen=True)
class AdapterMemory:
    """Saved tensors of one layer with adapters, less those of a layer whose weights are trained.

    A frozen projection without an adapter does not save its input; with one it saves ``r`` values a token too. In bf16
    the factors are rounded for the products, and a frozen router does not save its input in fp32; in fp32 the factors A
    of several projections with one input are concatenated.
    """

    model: ModelDescription
    config: Config
    layout: Layout
    adapters: Adapters
    tokens: int
    """Tokens of the pass on one context-parallel rank."""
    hidden: int
    """Values of the residual stream of one token on this rank."""
    expert_rows: float
    """Tokens of one rank that its experts compute, per expert of a token."""

    def bytes_of(self, layer: Layer) -> int:
        """Bytes for one layer; negative where the layer saves less than one without adapters."""
        values = self._values(layer) + self._expert_values(layer)
        if not self.config.bf16_in_use:
            return int(4 * (values + self.adapters.r * self._concatenated(layer)))
        routed = 0 if layer.experts is None else 4 * self.tokens * self.model.hidden_size
        return int(2 * (values + self._factors[layer])) - routed

    def dropping_bytes(self, layer: Layer) -> int:
        """Tensors that dropout of the largest adapted input of a layer makes: the mask, the product, and hashes."""
        if not self.adapters.dropout:
            return 0
        elements = max((size for adapted, size in self._inputs(layer) if adapted), default=0)
        return int((3 if self.config.bf16_in_use else 5) * elements + 3 * 8 * min(elements, ELEMENTS))

    def _inputs(self, layer: Layer) -> list[tuple[int, float]]:
        """Adapted projections, and numbers, of each input of projections on this rank."""
        names, tensor, expert_tensor = self.model.names, self.layout.tensor, self.layout.expert_tensor_ranks
        attention = layer.attention.share(0, tensor).padded_queries * layer.attention.head_dim
        values: list[tuple[Sequence[str], float]] = [
            (names.qkv, self.tokens * self.hidden),
            ((names.o,), self.tokens * attention),
        ]
        if layer.mlp is not None:
            width = layer.mlp.width // tensor
            values += [(names.gate_up, self.tokens * self.hidden), ((names.down,), self.tokens * width)]
        if layer.experts is not None:
            rows, width = self.expert_rows * layer.experts.top_k, layer.experts.width // expert_tensor
            values += [(names.expert_gate_up, rows * self.model.hidden_size), ((names.expert_down,), rows * width)]
        return [(self._adapted(group), size) for group, size in values]

    @functools.cached_property
    def _factors(self) -> dict[Layer, int]:
        """Number of parameters of the adapters of a layer on one rank."""
        found = {}
        expert_ranks = self.layout.expert * self.layout.expert_tensor_ranks
        for layer in dict.fromkeys(self.model.layers):
            chunk = Chunk(0, 0, self.model.layers.index(layer), 1, False, False, self.layout.expert_tensor_ranks)
            dense = self.adapters.count(self.model, [chunk], self.layout.tensor, experts=False)
            found[layer] = dense + self.adapters.count(self.model, [chunk], expert_ranks, experts=True)
        return found

    def _values(self, layer: Layer) -> int:
        """Numbers saved of attention and MLP."""
        names, tensor, r = self.model.names, self.layout.tensor, self.adapters.r
        qkv, o = self._adapted(names.qkv), self._adapted((names.o,))
        attention = layer.attention.share(0, tensor).padded_queries * layer.attention.head_dim
        joined = self.config.batching_in_use != "padded" or self.layout.context > 1
        inputs = [(qkv, self.hidden), (o, attention if joined else 0)]
        gate_up = down = 0
        if layer.mlp is not None:
            gate_up, down = self._adapted(names.gate_up), self._adapted((names.down,))
            inputs += [(gate_up, self.hidden), (down, layer.mlp.width // tensor)]
        unsaved = sum(size for adapted, size in inputs if not adapted)
        shards = tensor if self.config.sequence_parallel else 1
        return self.tokens * (r * (qkv + gate_up) - unsaved) + self.tokens // shards * r * (o + down)

    def _expert_values(self, layer: Layer) -> float:
        """Numbers saved of experts."""
        experts, names = layer.experts, self.model.names
        if experts is None:
            return 0
        rows, hidden = self.expert_rows * experts.top_k, self.model.hidden_size
        gate_up, down = self._adapted(names.expert_gate_up), self._adapted((names.expert_down,))
        unsaved = (0 if gate_up else hidden) + (0 if down else experts.width // self.layout.expert_tensor_ranks)
        return rows * (self.adapters.r * (gate_up + down) - unsaved)

    def _concatenated(self, layer: Layer) -> int:
        """Numbers, for each of ``r``, of the factors A that are concatenated."""
        names, hidden = self.model.names, self.model.hidden_size
        groups = [(1, names.qkv)]
        if layer.mlp is not None:
            groups.append((1, names.gate_up))
        if layer.experts is not None:
            groups.append((layer.experts.number // self.layout.expert, names.expert_gate_up))
        numbers = ((copies, self._adapted(group)) for copies, group in groups)
        return sum(copies * hidden * number for copies, number in numbers if number > 1)

    def _adapted(self, names: Sequence[str]) -> int:
        """How many of some projections, by their names within a layer, have adapters."""
        return sum(name.rsplit(".", 1)[-1] in self.adapters.modules for name in names)
