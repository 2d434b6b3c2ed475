"""The memory of a pass that adapters add or save, from shapes alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.model.adapters import Adapters
from mindspeed_simpo.model.description import Attention, Layer, ModelDescription
from mindspeed_simpo.model.dropout import ELEMENTS
from mindspeed_simpo.model.naming import Chunk


@dataclass(frozen=True)
class _Input:
    """An input of projections, whose names are those within a layer."""

    size: int
    """Numbers of a token, on average over the tokens of the pass."""
    columns: Sequence[str]
    """The column-parallel projections of it, whose ranks have ``A x`` of all tokens."""
    others: Sequence[str] = ()
    """Its row-parallel and its replicated projections."""
    kept: bool = False
    """Whether what computes it saves it too."""

    @property
    def names(self) -> Sequence[str]:
        """All its projections."""
        return *self.columns, *self.others


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
    blockwise: Callable[[Attention], bool]
    """Whether an attention is computed in blocks of queries."""

    def bytes_of(self, layer: Layer) -> int:
        """Bytes for one layer; negative where the layer saves less than one without adapters."""
        values = self._values(layer) + self._expert_values(layer)
        if not self.config.bf16_in_use:
            return int(4 * (values + self.adapters.r * self._concatenated(layer)))
        routed = 0 if layer.experts is None else 4 * self.tokens * self.model.hidden_size
        return int(2 * (values + self._factors[layer])) - routed

    def attention_dropping_bytes(self, layer: Layer) -> int:
        """Tensors that dropout of the largest adapted input of the attention's projections makes."""
        inputs = self._attention_inputs(layer.attention)
        return self._dropping_bytes([self.tokens * each.size for each in inputs if self._adapted(each.names)])

    def feed_forward_dropping_bytes(self, layer: Layer) -> int:
        """Tensors that dropout of the largest adapted input of MLP and experts makes."""
        sizes: list[float] = [self.tokens * each.size for each in self._mlp_inputs(layer) if self._adapted(each.names)]
        if layer.experts is not None:
            names, rows = self.model.names, self.expert_rows * layer.experts.top_k
            width = layer.experts.width // self.layout.expert_tensor_ranks
            groups = ((names.expert_gate_up, self.model.hidden_size), ((names.expert_down,), width))
            sizes += [rows * size for group, size in groups if self._adapted(group)]
        return self._dropping_bytes(sizes)

    def _dropping_bytes(self, sizes: Sequence[float]) -> int:
        """Of inputs of ``sizes`` numbers, one after the other: the mask, the product, and hashes."""
        elements = max(sizes, default=0) if self.adapters.dropout else 0
        return int((3 if self.config.bf16_in_use else 5) * elements + 3 * 8 * min(elements, ELEMENTS))

    def _mlp_inputs(self, layer: Layer) -> list[_Input]:
        names, mlp = self.model.names, layer.mlp
        if mlp is None:
            return []
        return [_Input(self.hidden, names.gate_up), _Input(mlp.width // self.layout.tensor, (), (names.down,))]

    def _attention_inputs(self, attention: Attention) -> list[_Input]:
        names, share, latent = self.model.names, attention.share(0, self.layout.tensor), attention.latent
        if latent is None:
            # the kernel saves its result, unless it computes blocks or the results of several calls are concatenated
            whole = self.config.batching_in_use == "padded" and self.layout.context == 1
            kept = whole and not self.blockwise(attention)
            width = share.padded_queries * attention.head_dim
            return [_Input(self.hidden, names.qkv), _Input(width, (), (names.o,), kept=kept)]
        values = _Input(share.queries * latent.value_dim, (), (names.o,), kept=latent.value_dim >= attention.head_dim)
        keys = _Input(latent.kv_rank // self._shards, (names.kv_from_latent,))
        if latent.query_rank is None:
            return [_Input(self.hidden, (names.q,), (names.kv_latent,)), keys, values]
        queries = _Input(latent.query_rank // self._shards, (names.q_from_latent,))
        return [_Input(self.hidden, (), (names.q_latent, names.kv_latent)), queries, keys, values]

    @property
    def _shards(self) -> int:
        """Ranks that divide the tokens between the sharded projections."""
        return self.layout.tensor if self.config.sequence_parallel else 1

    @functools.cached_property
    def _factors(self) -> dict[Layer, int]:
        """Number of parameters of the adapters of a layer on one rank."""
        found = {}
        expert_ranks = self.layout.expert * self.layout.expert_tensor_ranks
        for layer, index in self.model.first_of_kind.items():
            chunk = Chunk(0, 0, index, 1, False, False, self.layout.expert_tensor_ranks)
            dense = self.adapters.count(self.model, [chunk], self.layout.tensor, experts=False)
            found[layer] = dense + self.adapters.count(self.model, [chunk], expert_ranks, experts=True)
        return found

    def _values(self, layer: Layer) -> int:
        """Numbers saved of attention and MLP."""
        values = 0
        for each in (*self._attention_inputs(layer.attention), *self._mlp_inputs(layer)):
            if not each.kept and not self._adapted(each.names):
                values -= self.tokens * each.size
            columns, others = self._adapted(each.columns), self._adapted(each.others)
            values += self.adapters.r * (self.tokens * columns + self.tokens // self._shards * others)
        return values

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
