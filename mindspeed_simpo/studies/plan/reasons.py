"""Why a layout loses against the winner, in words."""

from __future__ import annotations

import dataclasses
import math

from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.studies.plan.collectives import Axis, group_of
from mindspeed_simpo.studies.plan.devices import DeviceKind
from mindspeed_simpo.studies.plan.rank import USABLE, Degrees, Ranked
from mindspeed_simpo.studies.plan.simulation import StepTime

_GIB = 2**30
NAMES = {
    "compute": "computation",
    "tensor": "messages of tensor ranks",
    "context": "messages of context ranks",
    "expert": "exchanges of experts",
    "pipeline": "pipeline bubble",
    "imbalance": "imbalance of data ranks",
    "recompute": "recomputation",
    "gradients": "reduction of gradients",
    "optimizer": "optimizer",
    "host": "host",
    "shared cores": "ranks that share cores",
}
"""What the parts of a step are called."""
_AXES: dict[str, tuple[Axis, ...]] = {
    "tensor": ("tensor",),
    "context": ("context",),
    "expert": ("expert",),
    "gradients": ("data", "expert data"),
}
"""The axes whose messages a part has."""


def why_not(degrees: Degrees, winner: Ranked, kind: DeviceKind) -> str:
    """Why other degrees are not those of the winner: a factor and what costs most more, or the memory that is missing.

    Args:
        degrees: Others than the winner's.
        winner: The fastest that fits.
        kind: Of the devices.
    """
    if degrees.best is not None:
        return slower_because(degrees.best.time, winner.time, degrees.layout, kind)
    if degrees.refused is None:
        least = dataclasses.replace(degrees.bound, total=max(degrees.bound.total, degrees.least))
        return "at least " + slower_because(least, winner.time, degrees.layout, kind)
    if math.isfinite(degrees.left):
        return f"at least {degrees.left / winner.time.total:.2f} x: what is faster does not fit"
    missing = (degrees.refused.memory_bytes - USABLE * kind.memory_bytes) / _GIB
    return f"does not fit: {missing:.3g} GiB more than {USABLE:.0%} of the memory"


def slower_because(time: StepTime, winner: StepTime, layout: Layout, kind: DeviceKind) -> str:
    """By which factor a step is slower, and the parts that cost most more."""
    more = extra_seconds(time, winner)
    worst = sorted(more, key=lambda name: -more[name])[:2]
    named = ", ".join(f"{name_of(name, layout, kind)} +{in_seconds(more[name])}" for name in worst)
    return f"{time.total / winner.total:.2f} x" + (f": {named}" if named else "")


def extra_seconds(time: StepTime, winner: StepTime) -> dict[str, float]:
    """The parts of a step that cost more than those of the winner's, by a thousandth of its step or more."""
    more = {name: seconds - winner.parts.get(name, 0.0) for name, seconds in time.parts.items()}
    return {name: seconds for name, seconds in more.items() if seconds >= 0.001 * winner.total}


def name_of(part: str, layout: Layout, kind: DeviceKind) -> str:
    """The part in words; of messages also whether they leave the host."""
    groups = [group_of(axis, layout, kind) for axis in _AXES.get(part, ())]
    return NAMES[part] + (" between hosts" if any(group.inside < group.size for group in groups) else "")


def in_seconds(value: float) -> str:
    """A time with three digits and its unit."""
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
