"""The search for the fastest layouts that fit, and why each of the others loses."""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from mindspeed_simpo.studies.plan.layouts import SEARCHED, Space
from mindspeed_simpo.studies.plan.simulation import Candidate, Simulator, StepTime

USABLE = 0.9
"""Share of a device's memory that the estimate may need; the rest is for libraries, buffers and fragmentation."""
_GIB = 2**30


@dataclass(frozen=True)
class Ranked:
    """A candidate that fits, simulated."""

    candidate: Candidate
    time: StepTime
    memory_bytes: int
    """Of the pipeline rank that needs most, in the whole run; beyond the ``keep`` fastest in the simulated steps."""


@dataclass(frozen=True)
class Refused:
    """A candidate that does not fit."""

    candidate: Candidate
    least_seconds: float
    memory_bytes: int


@dataclass
class Plan:
    """The result of a search."""

    ranked: list[Ranked] = field(default_factory=list)
    """Fastest first."""
    refused: list[Refused] = field(default_factory=list)
    """Those that do not fit, of the candidates that could have been among ``ranked``; least seconds first."""
    slower: list[tuple[float, Candidate]] = field(default_factory=list)
    """Candidates whose lower bound is above the seconds of all ``ranked``, with the bound; not simulated further."""
    state_bytes: int = 0
    """Least bytes of parameters, gradients and optimizer state of any allowed layout."""

    @property
    def allowed(self) -> int:
        """Candidates that validation allows, with more work only where less work does not fit."""
        return len(self.ranked) + len(self.refused) + len(self.slower)


def search(space: Space, simulator: Simulator, keep: int) -> Plan:
    """The ``keep`` fastest candidates that fit.

    Candidates are taken in the order of the lower bounds of their seconds; the search ends when the next bound is above
    the seconds of the ``keep`` fastest. So none that is left out is faster than any that is kept.

    Args:
        space: What is searched.
        simulator: Of the same model.
        keep: Number of candidates.
    """
    plan = Plan()
    numbers = itertools.count()
    waiting = [(simulator.lower_bound(each), next(numbers), each) for each in space.candidates()]
    heapq.heapify(waiting)
    seen = {_key(each) for _, _, each in waiting}
    limit = USABLE * simulator.kind.memory_bytes
    while waiting and not (len(plan.ranked) >= keep and waiting[0][0] > plan.ranked[keep - 1].time.total):
        bound, _, candidate = heapq.heappop(waiting)
        slowest = plan.ranked[keep - 1].time.total if len(plan.ranked) >= keep else math.inf
        found = _judged(simulator, candidate, limit, slowest)
        if isinstance(found, Ranked):
            bisect.insort(plan.ranked, found, key=lambda each: each.time.total)
            continue
        plan.refused.append(Refused(candidate, bound, found))
        for other in space.heavier(candidate):
            if _key(other) not in seen:
                seen.add(_key(other))
                heapq.heappush(waiting, (simulator.lower_bound(other), next(numbers), other))
    plan.slower = [(bound, each) for bound, _, each in sorted(waiting)]
    return plan


def _judged(simulator: Simulator, candidate: Candidate, limit: float, slowest: float) -> Ranked | int:
    """The candidate with its seconds, or the bytes that it needs where these are above ``limit``.

    The largest pass of the whole run takes long to find: a candidate that is slower than ``slowest`` is judged by the
    simulated steps.
    """
    needed = max(each.total for each in simulator.memory(candidate))
    if needed > limit:
        return needed
    time = simulator.step(candidate)
    if time.total < slowest:
        needed = max(each.total for each in simulator.memory(candidate, whole_run=True))
        if needed > limit:
            return needed
    return Ranked(candidate, time, needed)


def _key(candidate: Candidate) -> tuple[object, ...]:
    return tuple(getattr(candidate.config, name) for name in SEARCHED)


def reasons(plan: Plan, memory_bytes: int) -> Iterator[tuple[Candidate, str]]:
    """Why each candidate loses against the winner, in the order of their seconds.

    Args:
        plan: A plan with a winner.
        memory_bytes: Of a device.
    """
    winner = plan.ranked[0].time
    for each in plan.ranked[1:]:
        yield each.candidate, slower_because(each.time, winner)
    for refused in plan.refused:
        missing = (refused.memory_bytes - USABLE * memory_bytes) / _GIB
        yield refused.candidate, f"does not fit: {missing:.3g} GiB more than {USABLE:.0%} of the memory"
    for bound, candidate in plan.slower:
        yield candidate, f"at least {bound / winner.total:.2f} x: the lower bound of its busiest rank"


def slower_because(time: StepTime, winner: StepTime) -> str:
    """By which factor a step is slower, and the parts that cost most more."""
    more = {name: seconds - winner.parts.get(name, 0.0) for name, seconds in time.parts.items()}
    worst = sorted((name for name in more if more[name] > 0), key=lambda name: -more[name])[:2]
    named = ", ".join(f"{NAMES[name]} +{in_seconds(more[name])}" for name in worst)
    return f"{time.total / winner.total:.2f} x" + (f": {named}" if named else "")


NAMES = {
    "compute": "computation",
    "tensor": "tensor collectives",
    "context": "context collectives",
    "expert": "exchanges of experts",
    "pipeline": "idle pipeline ranks",
    "imbalance": "fuller data ranks",
    "gradients": "reduction of gradients",
    "optimizer": "optimizer",
    "host": "host",
    "shared cores": "ranks that share cores",
}
"""What the parts of a step are called."""


def in_seconds(value: float) -> str:
    """A time with three digits and its unit."""
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
