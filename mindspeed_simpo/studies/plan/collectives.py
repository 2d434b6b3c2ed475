"""The messages of a layout: how many bytes of which collective on which axis, and how long a link needs for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.model.description import Attention, Layer, ModelDescription
from mindspeed_simpo.studies.plan.devices import Collective, DeviceKind
from mindspeed_simpo.studies.plan.passes import Passes

Axis = Literal["tensor", "shared heads", "context", "expert", "pipeline", "data", "expert data", "world"]
FP32, FP64 = 4, 8


class Message(NamedTuple):
    """One kind of collective of a layer or of the ends of the model, for each pass."""

    kind: Collective
    axis: Axis
    size: np.ndarray
    """Bytes of the whole tensor: the input of a reduce, a scatter or an exchange, the output of a gather."""
    calls: float = 1
    """Collectives that the bytes are divided over."""


@dataclass(frozen=True)
class Group:
    """Ranks that a collective joins."""

    size: int
    inside: int
    """How many of them are on one host."""


def group_of(axis: Axis, layout: Layout, kind: DeviceKind, shared: int = 1) -> Group:
    """The group of an axis; ranks are numbered tensor first, then context, data and pipeline.

    Args:
        axis: The axis.
        layout: Degrees.
        kind: Devices of a host.
        shared: Ranks that share a key-value head.
    """
    tensor, context, data = layout.tensor, layout.context, layout.data
    expert_ranks = layout.expert * layout.expert_tensor_ranks
    size, stride = {
        "tensor": (tensor, 1),
        "shared heads": (shared, 1),
        "context": (context, tensor),
        "expert": (expert_ranks, 1),
        "data": (data * context, tensor),
        "expert data": (data * context * tensor // expert_ranks, expert_ranks),
        "pipeline": (layout.pipeline, tensor * context * data),
        "world": (layout.ranks, 1),
    }[axis]
    return Group(size, max(1, min(size, kind.devices_per_host // stride)))


def seconds(
    kind: Collective, size: np.ndarray | float, group: Group, device: DeviceKind, calls: float = 1
) -> np.ndarray:
    """Time of a collective, seconds.

    With k ranks of a host and m hosts, B bytes of the whole tensor: a gather or scatter moves ``B (k - 1) / k`` inside
    of a host and ``(B / k) (m - 1) / m`` from each device to other hosts; a reduce is a scatter and a gather; of an
    exchange each rank sends ``B / (k m)`` to each rank; a message is sent whole. Each call has
    ``ceil(log2 k)`` steps inside and ``ceil(log2 m)`` outside. Inside, the k ranks use the wires between them.

    Args:
        kind: The collective.
        size: Bytes of the whole tensor, of all calls together; of an exchange the bytes that a rank sends.
        group: The ranks.
        device: Its links.
        calls: Number of collectives.
    """
    size = np.asarray(size, dtype=float)
    inside, outside, ranks = device.inside, device.outside, group.size
    if ranks <= 1:
        return np.zeros_like(size)
    hosts = -(-ranks // group.inside)
    if kind == "send":
        link = inside if hosts == 1 else outside
        return calls * link.latency_s + size / link.rate(1) * link.slower.get(kind, 1.0)
    steps = calls * math.ceil(math.log2(group.inside)), calls * math.ceil(math.log2(hosts))
    if kind == "exchange":
        moved = size * (group.inside - 1) / ranks, size * (ranks - group.inside) / ranks
    else:
        moved = size * (group.inside - 1) / group.inside, size / group.inside * (hosts - 1) / hosts
    rates = inside.rate(max(1, group.inside - 1)), outside.bytes_per_s
    times = [
        (each.latency_s * number + part / rate) * each.slower.get(kind, 1.0)
        for each, number, part, rate in zip((inside, outside), steps, moved, rates, strict=True)
    ]
    return (2 if kind == "reduce" else 1) * (times[0] + times[1])


@dataclass(frozen=True)
class Traffic:
    """The messages of one rank's passes."""

    model: ModelDescription
    config: Config
    layout: Layout
    passes: Passes

    @property
    def width(self) -> int:
        """Bytes of the compute dtype."""
        return 2 if self.config.bf16_in_use else 4

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of a context-parallel rank."""
        return self.passes.tokens / self.layout.context

    @property
    def hidden(self) -> np.ndarray:
        """Bytes of the hidden states of a context-parallel rank."""
        return self.tokens * self.model.hidden_size * self.width

    @property
    def sequence_parallel(self) -> bool:
        """Whether the tensor-parallel ranks divide the tokens between the projections."""
        return self.config.sequence_parallel and self.layout.tensor > 1

    def forward(self, layer: Layer) -> list[Message]:
        """Of the forward of a layer."""
        return self._of_layer(layer, backward=False)

    def backward(self, layer: Layer) -> list[Message]:
        """Of the backward of a layer, without recomputation."""
        return self._of_layer(layer, backward=True)

    def _of_layer(self, layer: Layer, *, backward: bool) -> list[Message]:
        attention = self._attention(layer.attention, backward=backward)
        return [*self._tensor(layer, backward=backward), *attention, *self._experts(layer)]

    def _tensor(self, layer: Layer, *, backward: bool) -> list[Message]:
        if self.layout.tensor == 1:
            return []
        blocks = 1 if layer.mlp is None else 2
        sizes = blocks * self.hidden
        if self.sequence_parallel:  # the backward gathers the inputs once more
            return [
                Message("gather", "tensor", (2 if backward else 1) * sizes, (2 if backward else 1) * blocks),
                Message("scatter", "tensor", sizes, blocks),
            ]
        found = [Message("reduce", "tensor", sizes, blocks)]
        if layer.experts is not None:  # the ranks compute a part of the tokens each
            found.append(Message("gather", "tensor", self.hidden))
        return found

    def _attention(self, attention: Attention, *, backward: bool) -> list[Message]:
        layout, share = self.layout, attention.share(0, self.layout.tensor)
        joining: Collective = "scatter" if backward else "gather"
        dims = attention.head_dim + attention.value_dim
        found = []
        if share.kv_parts > 1 and attention.latent is None:
            size = self.tokens * dims * self.width
            found.append(Message(joining, "shared heads", size))
        if layout.context == 1:
            return found
        heads = share.queries if attention.latent is not None else share.kv_heads
        keys = self.passes.tokens * heads * dims * self.width
        if self.config.context_parallel_algo == "gathered":
            found.append(Message(joining, "context", keys, 2))
        elif self.config.context_parallel_algo == "ulysses_cp_algo":
            sent = (keys + self.passes.tokens * share.queries * dims * self.width) / layout.context
            found.append(Message("exchange", "context", sent, 4))
        else:  # the ring passes its slice on; in the backward with the gradient
            turns = layout.context - 1
            found.append(Message("send", "context", (2 if backward else 1) * keys / layout.context * turns, turns))
        return found

    def _experts(self, layer: Layer) -> list[Message]:
        """Rows to the ranks of their experts and back; also their numbers, for which the host waits."""
        layout, experts = self.layout, layer.experts
        if experts is None or layout.expert * layout.expert_tensor_ranks == 1:
            return []
        rows = self.tokens / layout.tensor * experts.top_k * layout.expert_tensor_ranks
        return [Message("exchange", "expert", 2 * rows * self.model.hidden_size * self.width, 3)]

    def ends(self, *, first: bool, last: bool, backward: bool) -> list[Message]:
        """Of the embedding on the first pipeline rank, and of the output layer and the loss on the last."""
        found: list[Message] = []
        scored = self.passes.scored / self.layout.context
        if self.layout.tensor > 1:
            if self.sequence_parallel:
                if first:
                    found.append(Message("gather" if backward else "scatter", "tensor", self.hidden))
                if last:
                    found.append(Message("scatter" if backward else "gather", "tensor", self.hidden))
            elif first and not backward:
                found.append(Message("reduce", "tensor", self.hidden))
            elif last and backward:
                found.append(Message("reduce", "tensor", scored * self.model.hidden_size * self.width))
            if last and not backward:
                found.append(Message("reduce", "tensor", 3 * FP32 * scored, 2))
        if self.layout.context > 1 and last and not backward:
            found.append(Message("reduce", "context", FP64 * self.passes.sequences))
        return found

    def between_stages(self) -> np.ndarray:
        """Bytes that a pipeline rank sends to the next in a forward, or back in a backward."""
        return self.hidden / (self.layout.tensor if self.sequence_parallel else 1)


def step_messages(
    config: Config, layout: Layout, dense: int, of_experts: int, norms: int
) -> list[tuple[Collective, Axis, float]]:
    """What a rank sends once a step: kind, axis and bytes.

    Args:
        config: ``use_distributed_optimizer`` and precision.
        layout: Degrees.
        dense: Trained parameters of the rank, without those of experts.
        of_experts: Trained parameters of the rank's experts.
        norms: Parameters that sequence-parallel ranks hold alike, whose gradients they add up.
    """
    width = 2 if config.bf16_in_use else 4
    found: list[tuple[Collective, Axis, float]] = [
        ("reduce", "world", 8),
        ("reduce", "world", 96),
        ("reduce", "world", 4),
    ]
    if config.sequence_parallel and layout.tensor > 1:
        found.append(("reduce", "tensor", FP32 * norms))
    parts: list[tuple[Axis, int]] = [("data", dense), ("expert data", of_experts)]
    for axis, number in parts:
        if config.use_distributed_optimizer:
            found += [("scatter", axis, FP32 * number), ("gather", axis, width * number)]
        else:
            found.append(("reduce", axis, FP32 * number))
    return found
