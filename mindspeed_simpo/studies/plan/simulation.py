"""Memory and seconds of a step of one candidate, simulated over the lengths of the run's own pairs."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.model.adapters import Adapters
from mindspeed_simpo.model.description import Layer, ModelDescription
from mindspeed_simpo.model.naming import Chunk, pipeline_chunks
from mindspeed_simpo.studies.plan.collectives import Group, group_of, seconds, step_messages
from mindspeed_simpo.studies.plan.devices import Collective, DeviceKind
from mindspeed_simpo.studies.plan.passes import Passes
from mindspeed_simpo.studies.plan.pipeline import makespan
from mindspeed_simpo.studies.plan.run_lengths import FULLEST, RunLengths, StepPasses
from mindspeed_simpo.studies.plan.work import PARTS, Costs
from mindspeed_simpo.training.memory import MemoryEstimate, count_parameters, estimate_memory

_BACKWARD_HOST = 1.5
"""Host seconds of a layer's backward over those of its forward."""
_OPTIMIZER_BYTES = 40
"""Bytes that norm, clipping and Adam read and write for a parameter in fp32; and 4 more to set its gradient to zero."""
_FP32 = 4
HOST, RECOMPUTE = PARTS.index("host"), PARTS.index("recompute")


End = Literal["first forward", "last backward"]
"""The passes of a step that hide messages over data-parallel ranks."""


@dataclass(frozen=True)
class Candidate:
    """A configuration, resolved for model and device, and the layout that it has."""

    config: Config
    layout: Layout


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and what they are spent on."""

    total: float
    parts: dict[str, float]
    """Compute, collectives by axis, idle time of the pipeline, waiting for fuller data-parallel ranks, gradients,
    optimizer and host; their sum is ``total``."""
    pairs: float
    """Pairs of the step."""

    @property
    def pairs_per_second(self) -> float:
        """Of all devices together."""
        return self.pairs / self.total


@dataclass(frozen=True)
class Stages:
    """Seconds of all passes on each virtual stage: ``[stage, part, pass]``."""

    forward: np.ndarray
    backward: np.ndarray


@dataclass(frozen=True)
class Simulator:
    """Simulates candidates of one model, run and kind of device."""

    model: ModelDescription
    kind: DeviceKind
    run: RunLengths

    def memory(self, candidate: Candidate, *, whole_run: bool = False) -> list[MemoryEstimate]:
        """What ``check`` estimates for each pipeline rank, of the simulated steps' passes or of the whole run's."""
        largest = self.run.largest(candidate.config, candidate.layout, whole_run=whole_run)
        return estimate_memory(self.model, candidate.config, candidate.layout, largest, self.kind.device)

    def step(self, candidate: Candidate) -> StepTime:
        """Simulate a step: the mean over the simulated steps."""
        simulated = self.run.steps(candidate.config, candidate.layout, ranks=FULLEST)
        spent = [self._passes_of_step(candidate, step) for step in simulated]
        parts = {name: float(np.mean([each[name] for each, _ in spent])) for name in spent[0][0]}
        for name, value in self.of_step(candidate, rank=0).items():
            parts[name] = parts.get(name, 0.0) + value
        for place, needed in self._overlapped(candidate, rank=0).items():
            hidden_behind = float(np.mean([ends[place] for _, ends in spent]))
            parts["gradients"] += max(0.0, needed - hidden_behind)
        if self.kind.cores is not None:
            parts["shared cores"] = self._waits_for_cores(candidate, parts)
        return StepTime(sum(parts.values()), parts, float(np.mean([step.pairs for step in simulated])))

    def _waits_for_cores(self, candidate: Candidate, parts: dict[str, float]) -> float:
        """Seconds by which the ranks of a host, which share its cores, need longer than a step with a core each."""
        assert self.kind.cores is not None
        layout = candidate.layout
        ranks = min(layout.ranks, self.kind.devices_per_host)
        busy = ranks * sum(parts[name] for name in ("compute", "recompute", "optimizer", "host"))
        return max(0.0, busy / self.kind.cores - sum(parts.values()))

    def _passes_of_step(self, candidate: Candidate, step: StepPasses) -> tuple[dict[str, float], dict[End, float]]:
        """Seconds of the passes of one step, and of the first forward and last backward of the first pipeline rank.

        The data-parallel ranks wait for the slowest.
        """
        ranks = step.ranks
        ends: dict[End, float] = {}
        by_number: dict[int, list[Passes]] = defaultdict(list)
        for passes in ranks:
            by_number[passes.number].append(passes)
        slowest, found = -1.0, {}
        for number, several in by_number.items():
            stages = self.stages(candidate, Passes.joined(several))
            joint = candidate.layout.experts_span_data_ranks
            forward, backward = (_by_scenario(each, number, joint=joint) for each in (stages.forward, stages.backward))
            spans = self._spans(candidate, several, forward.sum(axis=1), backward.sum(axis=1))
            fullest = int(spans.argmax())
            if spans[fullest] > slowest:
                slowest = float(spans[fullest])
                first, last = forward[..., 0, fullest], backward[..., -1, fullest]
                own = slice(None, None, candidate.layout.pipeline)
                ends = {"first forward": float(first[own].sum()), "last backward": float(last[own].sum())}
                there, back = (each[..., fullest].sum(axis=0) for each in (forward, backward))
                busy = there.sum(axis=1) + back.sum(axis=1)
                busy[RECOMPUTE] += self._scored_before(candidate, there.sum(axis=0))
                found = dict(zip(PARTS, busy / candidate.layout.pipeline, strict=True))
        idle = slowest - sum(found.values())
        found = {name: float(value) * step.balance for name, value in found.items()}
        found |= {"pipeline": idle * step.balance, "imbalance": slowest * (1 - step.balance)}
        return found, ends

    def _spans(
        self, candidate: Candidate, several: Sequence[Passes], forward: np.ndarray, backward: np.ndarray
    ) -> np.ndarray:
        """Seconds of each scenario from ``[stage, pass, scenario]``."""
        layout, number = candidate.layout, several[0].number
        costs = Costs(self.model, candidate.config, layout, self.kind, Passes.joined(several))
        group = group_of("pipeline", layout, self.kind)
        send = seconds("send", costs.traffic.between_stages(), group, self.kind).reshape(-1, number).T
        if forward.shape[2] != send.shape[1]:  # ranks that share experts
            send = send.max(axis=1, keepdims=True)
        total = makespan(forward, backward, send, layout.pipeline)
        if candidate.config.pair_schedule == "two_pass":  # the second halves are scored first
            total = total + makespan(forward[:, 1::2], None, send[1::2], layout.pipeline)
        if candidate.config.reference_is_base:
            total = total + makespan(forward, None, send, layout.pipeline)
        return total

    @staticmethod
    def _scored_before(candidate: Candidate, forward: np.ndarray) -> float:
        """Seconds of the forwards without gradients, from those of all passes with gradients."""
        halves = forward[1::2].sum() if candidate.config.pair_schedule == "two_pass" else 0.0
        return float(halves + candidate.config.reference_is_base * forward.sum())

    def stages(self, candidate: Candidate, passes: Passes) -> Stages:
        """Seconds of each pass on each virtual stage."""
        config, layout = candidate.config, candidate.layout
        costs = Costs(self.model, config, layout, self.kind, passes)
        of_layers = {layer: costs.layer(layer) for layer in self.model.first_of_kind}
        ends = costs.embedding(), costs.head()
        chunks = _chunks(self.model, layout, config.virtual_pipeline_size(self.model.num_layers) or 1)
        found: dict[object, tuple[np.ndarray, np.ndarray]] = {}  # of equal chunks, which most are
        stages = []
        for chunk in chunks:
            layers = _layers(self.model, chunk)
            key = layers, chunk.has_embedding, chunk.has_head
            if key not in found:
                there, back = (np.zeros((len(PARTS), passes.number)) for _ in range(2))
                for layer, number in layers:
                    forward, backward, core = of_layers[layer]
                    there += number * forward
                    back += number * backward
                    back[RECOMPUTE] += number * _again(config, chunk) * forward.sum(axis=0)
                    back[RECOMPUTE] += number * (config.recompute_granularity == "selective") * core.sum(axis=0)
                for has, (forward, backward) in zip(key[1:], ends, strict=True):
                    there += has * forward
                    back += has * backward
                with_experts = sum(number for layer, number in layers if layer.experts is not None)
                host = self.kind.layer_host_s * chunk.num_layers + self.kind.experts_host_s * with_experts
                self._add_host(there, host + self.kind.pass_host_s)
                self._add_host(back, (_BACKWARD_HOST + _again(config, chunk)) * host + self.kind.pass_host_s)
                found[key] = there, back
            stages.append(found[key])
        return Stages(*(np.stack(each) for each in zip(*stages, strict=True)))

    def _add_host(self, times: np.ndarray, host: float) -> None:
        """Add what the host needs; where it runs ahead of the device, what it needs longer than the device."""
        times[HOST] += np.maximum(0, host - times.sum(axis=0)) if self.kind.asynchronous else host

    def _gradient_messages(self, candidate: Candidate, rank: int) -> list[tuple[End | None, float]]:
        """Seconds of each message of a step beside its passes, and what it is overlapped with; None for nothing."""
        config, layout = candidate.config, candidate.layout
        dense, of_experts = trained_parameters(self.model, config, layout, rank)
        chunks = [each for each in _chunks(self.model, layout, 1) if each.pipeline_rank == rank]
        norms = 2 * self.model.hidden_size * sum(chunk.num_layers for chunk in chunks)
        return [
            (
                _overlapped_with(config, kind) if axis in ("data", "expert data") else None,
                float(seconds(kind, size, group_of(axis, layout, self.kind), self.kind)),
            )
            for kind, axis, size in step_messages(config, layout, dense, of_experts, norms)
        ]

    def _overlapped(self, candidate: Candidate, rank: int) -> dict[End, float]:
        """Seconds of the messages that are overlapped, by what hides them."""
        found: dict[End, float] = defaultdict(float)
        for end, value in self._gradient_messages(candidate, rank):
            if end is not None:
                found[end] += value
        return found

    def of_step(self, candidate: Candidate, rank: int) -> dict[str, float]:
        """Seconds of a step beside its passes, on one pipeline rank, without messages that are overlapped."""
        config, layout = candidate.config, candidate.layout
        dense, of_experts = trained_parameters(self.model, config, layout, rank)
        gradients = sum(value for end, value in self._gradient_messages(candidate, rank) if end is None)
        if self.model.tied and layout.pipeline > 1 and not config.lora_r:
            size = _FP32 * self.model.vocab_size * self.model.hidden_size / layout.tensor
            both = Group(2, min(2, group_of("pipeline", layout, self.kind).inside))
            gradients += float(seconds("reduce", size, both, self.kind))
        held: float = dense + of_experts
        if config.use_distributed_optimizer:
            copies = layout.data * layout.context
            expert_copies = copies * layout.tensor / (layout.expert * layout.expert_tensor_ranks)
            held = dense / copies + of_experts / expert_copies
        moved = _OPTIMIZER_BYTES * held + _FP32 * (dense + of_experts)
        optimizer = moved / self.kind.optimizer_bytes_per_s
        return {"gradients": gradients, "optimizer": optimizer, "host": self.kind.step_host_s}


def _overlapped_with(config: Config, kind: Collective) -> End | None:
    """What hides a message over data-parallel ranks: of updated parameters, or of gradients."""
    if kind == "gather":
        return "first forward" if config.overlap_param_gather else None
    return "last backward" if config.overlap_grad_reduce else None


@functools.lru_cache(maxsize=1024)
def _chunks(model: ModelDescription, layout: Layout, virtual: int) -> list[Chunk]:
    return pipeline_chunks(model, layout.pipeline, virtual, layout.expert_tensor_ranks)


@functools.lru_cache(maxsize=8192)
def _layers(model: ModelDescription, chunk: Chunk) -> tuple[tuple[Layer, int], ...]:
    """The kinds of layers of a chunk, and how many of each."""
    return tuple(Counter(chunk.layers(model)).items())


def trained_parameters(model: ModelDescription, config: Config, layout: Layout, rank: int) -> tuple[int, int]:
    """Parameters that a rank of one pipeline rank trains: without experts, and of experts."""
    chunks = [each for each in _chunks(model, layout, 1) if each.pipeline_rank == rank]
    adapters, expert_ranks = Adapters.of(config, model), layout.expert * layout.expert_tensor_ranks
    if adapters is not None:
        return (
            adapters.count(model, chunks, layout.tensor, experts=False),
            adapters.count(model, chunks, expert_ranks, experts=True),
        )
    return (
        count_parameters(model, chunks, layout.tensor, experts=False),
        count_parameters(model, chunks, expert_ranks, experts=True),
    )


def _again(config: Config, chunk: Chunk) -> float:
    """Share of a chunk's layers whose whole forward is recomputed."""
    if config.recompute_granularity != "full" or not chunk.num_layers:
        return 0.0
    if config.recompute_method != "block":
        return 1.0
    return min(config.recompute_num_layers or 1, chunk.num_layers) / chunk.num_layers


def _by_scenario(times: np.ndarray, number: int, *, joint: bool) -> np.ndarray:
    """``[stage, part, pass of all scenarios]`` -> ``[stage, part, pass, scenario]``; one scenario where ``joint``."""
    found = times.reshape(*times.shape[:2], -1, number).swapaxes(2, 3)
    return np.asarray(found.max(axis=3, keepdims=True) if joint else found)
