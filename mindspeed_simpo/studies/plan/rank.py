"""The search for the fastest layouts that fit."""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.studies.plan.bounds import Forms, bounds_of, interleaved_bounds
from mindspeed_simpo.studies.plan.layouts import RECOMPUTE, SEARCHED, Space, Values
from mindspeed_simpo.studies.plan.simulation import Candidate, Simulator, StepTime

USABLE = 0.9
"""Share of a device's memory that the estimate may need; the rest is for libraries, buffers and fragmentation."""


@dataclass(frozen=True)
class Ranked:
    """A candidate that fits in the simulated steps, simulated."""

    candidate: Candidate
    time: StepTime
    memory_bytes: int
    """Of the pipeline rank that needs most."""


@dataclass(frozen=True)
class Refused:
    """A candidate that does not fit."""

    candidate: Candidate
    memory_bytes: int


@dataclass
class Degrees:
    """Degrees of the parallel axes, and what the search found of the candidates that have them."""

    values: Values
    example: Candidate
    """Any of the candidates."""
    bound: StepTime
    """No candidate is faster."""
    fitting: list[Ranked] = field(default_factory=list)
    """Simulated candidates, fastest first."""
    refused: Refused | None = None
    """Of the candidates that do not fit, the one that needs least memory."""
    verified: bool = False
    """Whether the first of ``fitting`` fits in the whole run, and none that could be faster was left out."""
    left: float = math.inf
    """Least bound of the candidates that were left out, seconds."""

    @property
    def layout(self) -> Layout:
        """The degrees."""
        return self.example.layout

    @property
    def best(self) -> Ranked | None:
        """The fastest that is known."""
        return self.fitting[0] if self.fitting else None

    @property
    def least(self) -> float:
        """Seconds that a step takes at least; infinite where nothing fits."""
        return min(self.left, self.fitting[0].time.total if self.fitting else math.inf)


@dataclass
class Plan:
    """The result of a search."""

    ranked: list[Degrees] = field(default_factory=list)
    """The degrees whose fastest candidates are known, fastest first."""
    others: list[Degrees] = field(default_factory=list)
    """Degrees whose candidates are all slower than those of ``ranked``; those first that may be fastest."""
    refused: list[Degrees] = field(default_factory=list)
    """Degrees of which no candidate fits; least memory first."""
    simulated: int = 0
    """Candidates that were simulated."""

    @property
    def winner(self) -> Ranked:
        """The fastest candidate; there is one."""
        return self.ranked[0].fitting[0]


class _Waiting(NamedTuple):
    """What the search takes next: in the order of the bounds."""

    bound: float
    number: int
    degrees: Degrees
    what: Candidate | None
    """None stands for all candidates without virtual stages, or with ``interleaved`` for those with virtual stages."""
    interleaved: bool = False


@dataclass
class _Search:
    """Candidates in the order of their bounds, until the next bound is above the seconds of the ``keep`` fastest."""

    space: Space
    simulator: Simulator
    keep: int
    waiting: list[_Waiting] = field(default_factory=list)
    skipped: dict[int, list[_Waiting]] = field(default_factory=dict)
    """Of each degrees what cannot be faster than their fastest."""
    seen: set[tuple[object, ...]] = field(default_factory=set)
    simulated: int = 0
    _forms: dict[object, Forms] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @cached_property
    def limit(self) -> float:
        return USABLE * self.simulator.kind.memory_bytes

    def run(self) -> list[Degrees]:
        """All degrees; those that are ``verified`` are settled."""
        everything = list(self.begin())
        while True:
            fastest = self.fastest(everything)
            slowest = fastest[-1].fitting[0].time.total if len(fastest) == self.keep else math.inf
            if self.waiting and self.waiting[0].bound <= slowest:
                self.take(heapq.heappop(self.waiting))
                continue
            unverified = [each for each in fastest if not each.verified]
            if not unverified:
                break
            self.verify(unverified[0])
        for each in self.waiting:
            each.degrees.left = min(each.degrees.left, each.bound)
        return everything

    def fastest(self, everything: Sequence[Degrees]) -> list[Degrees]:
        """The ``keep`` fastest degrees so far."""
        known = [each for each in everything if each.fitting]
        return heapq.nsmallest(self.keep, known, key=lambda each: each.fitting[0].time.total)

    def begin(self) -> Iterator[Degrees]:
        """Degrees with their bounds, each made of all forms of micro-batches at once."""
        for values in self.space.degrees():
            example = next(self.space.forms_of(values, None), None)
            if example is None:
                continue
            forms = self.forms(values, example)
            bound = bounds_of(self.simulator, example, forms).least()
            degrees = Degrees(values, example, bound)
            self.push(bound.total, degrees, None)
            if self.space.virtual(values):
                whole = interleaved_bounds(self.simulator, example, forms).least()
                self.push(whole.total, degrees, None, interleaved=True)
                degrees.bound = min(bound, whole, key=lambda each: each.total)
            yield degrees

    def forms(self, values: Values, example: Candidate) -> Forms:
        """The mean passes of all forms, which depend on the data-parallel ranks and the length of rows alone."""
        layout = example.layout
        config = example.config
        key = layout.data, layout.sequence_multiple, layout.axes, config.micro_batch_multiple
        if key not in self._forms:
            self._forms[key] = Forms.of(self.simulator.run, list(self.space.forms_of(values, None)))
        return self._forms[key]

    def push(self, bound: float, degrees: Degrees, what: Candidate | None, *, interleaved: bool = False) -> None:
        """Add what has not been added before."""
        heapq.heappush(self.waiting, _Waiting(bound, next(self._numbers), degrees, what, interleaved))

    def take(self, next_one: _Waiting) -> None:
        """Divide it, simulate it, or find that it does not fit or cannot be the fastest of its degrees."""
        degrees, candidate = next_one.degrees, next_one.what
        if degrees.fitting and degrees.fitting[0].time.total <= next_one.bound:
            self.skipped.setdefault(id(degrees), []).append(next_one)
        elif candidate is None:
            if self.state_fits(degrees):
                numbers = self.space.virtual(degrees.values) if next_one.interleaved else [None]
                for virtual in numbers:
                    self.push_all(degrees, list(self.space.forms_of(degrees.values, virtual)))
        else:
            self.judge(degrees, candidate)

    def push_all(self, degrees: Degrees, candidates: Sequence[Candidate]) -> None:
        """Add candidates with the same degrees, virtual stages and recomputation."""
        new = [each for each in candidates if _key(each) not in self.seen]
        if not new:
            return
        self.seen.update(map(_key, new))
        bounds = bounds_of(self.simulator, new[0], Forms.of(self.simulator.run, new))
        for each, bound in zip(new, bounds.totals, strict=True):
            self.push(bound, degrees, each)

    def state_fits(self, degrees: Degrees) -> bool:
        """Whether parameters, gradients and optimizer state fit, which all candidates have."""
        needed = max(
            each.parameters + each.gradients + each.optimizer for each in self.simulator.memory(degrees.example)
        )
        if needed <= self.limit:
            return True
        self.refuse(degrees, degrees.example, needed)
        return False

    def judge(self, degrees: Degrees, candidate: Candidate) -> None:
        """Simulate what fits; of what does not fit, add what needs less memory."""
        needed = self.needed(candidate)
        if needed > self.limit:
            self.refuse(degrees, candidate, needed)
            for other in self.space.heavier(candidate):
                self.push_heavier(degrees, other)
            return
        fewest = self.fewest_layers(candidate) if self.recomputes_all(candidate) else candidate
        if fewest is candidate:
            self.simulate(degrees, candidate, needed)
        else:
            self.push_all(degrees, [fewest])

    def simulate(self, degrees: Degrees, candidate: Candidate, needed: int) -> None:
        """Add a candidate that fits."""
        self.simulated += 1
        found = Ranked(candidate, self.simulator.step(candidate), needed)
        bisect.insort(degrees.fitting, found, key=lambda each: each.time.total)

    def push_heavier(self, degrees: Degrees, candidate: Candidate) -> None:
        """Add a candidate; one that recomputes all layers with the bound of one that recomputes a single layer."""
        single = self.space.recomputing(candidate, 1) if self.recomputes_all(candidate) else None
        if single is None:
            self.push_all(degrees, [candidate])
        elif _key(candidate) not in self.seen:
            self.seen.add(_key(candidate))
            [bound] = bounds_of(self.simulator, single, Forms.of(self.simulator.run, [single])).totals
            self.push(bound, degrees, candidate)

    @staticmethod
    def recomputes_all(candidate: Candidate) -> bool:
        """Whether every layer is recomputed, one at a time."""
        config = candidate.config
        return config.recompute_granularity == "full" and config.recompute_method == "uniform"

    def fewest_layers(self, candidate: Candidate, *, whole_run: bool = False) -> Candidate:
        """The candidate with the fewest recomputed layers with which it fits; itself where fewer do not fit."""
        config, layers = candidate.config, self.space.model.num_layers
        whole = config.num_layers_per_virtual_pipeline_stage or math.ceil(layers / candidate.layout.pipeline)

        def fits(number: int) -> bool:
            other = self.space.recomputing(candidate, number)
            return other is not None and self.needed(other, whole_run=whole_run) <= self.limit

        fewest = bisect.bisect_left(range(1, whole), True, key=fits) + 1
        found = self.space.recomputing(candidate, fewest) if fewest < whole else None
        return candidate if found is None else found

    def needed(self, candidate: Candidate, *, whole_run: bool = False) -> int:
        """Bytes of the rank that needs most."""
        return max(each.total for each in self.simulator.memory(candidate, whole_run=whole_run))

    def refuse(self, degrees: Degrees, candidate: Candidate, needed: int) -> None:
        """Keep the candidate that needs least."""
        if degrees.refused is None or needed < degrees.refused.memory_bytes:
            degrees.refused = Refused(candidate, needed)

    def verify(self, degrees: Degrees) -> None:
        """Whether the fastest fits in the whole run, too, whose largest pass takes long to find."""
        best = degrees.fitting[0]
        needed = self.needed(best.candidate, whole_run=True)
        if needed <= self.limit:
            degrees.fitting[0] = Ranked(best.candidate, best.time, needed)
            degrees.verified = True
            return
        degrees.fitting.pop(0)
        self.refuse(degrees, best.candidate, needed)
        for each in self.skipped.pop(id(degrees), []):
            heapq.heappush(self.waiting, each)
        for other in self.space.heavier(best.candidate):
            self.push_heavier(degrees, other)
        every_layer = self.space.changed(best.candidate, RECOMPUTE[-1])
        if best.candidate.config.recompute_method == "block" and every_layer is not None:
            more = self.fewest_layers(every_layer, whole_run=True)
            if (needed := self.needed(more, whole_run=True)) <= self.limit:
                self.simulate(degrees, more, needed)


def search(space: Space, simulator: Simulator, keep: int) -> Plan:
    """The ``keep`` fastest degrees of the parallel axes, each with its fastest candidate that fits.

    Candidates are taken in the order of the lower bounds of their seconds; the search ends when the next bound is above
    the seconds of the ``keep`` fastest. So none that is left out is faster than any that is kept.

    Args:
        space: What is searched.
        simulator: Of the same model.
        keep: Number of degrees.
    """
    found = _Search(space, simulator, keep)
    everything = found.run()
    plan = Plan(simulated=found.simulated)
    plan.ranked = [each for each in found.fastest(everything) if each.verified]
    kept = set(map(id, plan.ranked))
    rest = [each for each in everything if id(each) not in kept]
    without = [each for each in rest if math.isinf(each.least)]
    plan.refused = sorted(without, key=lambda each: each.refused.memory_bytes if each.refused else 0)
    plan.others = sorted((each for each in rest if math.isfinite(each.least)), key=lambda each: each.least)
    return plan


def _key(candidate: Candidate) -> tuple[object, ...]:
    return tuple(getattr(candidate.config, name) for name in SEARCHED)
