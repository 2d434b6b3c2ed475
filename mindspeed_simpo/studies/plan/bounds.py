"""Lower bounds of the seconds of a step, of all forms of micro-batches of a layout at once.

A pipeline rank computes all its passes, after the first forward has come to it, and before the last backward has gone
on from it: ``T >= sum over passes of (F_r + B_r) + sum over s < r of (F_s(first) + B_s(last))`` on each rank r, with
1F1B and with the interleaved schedule. The seconds of a pass are a convex function of its sizes, so that passes of mean
size take least; and fewer passes of the same sum take less.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mindspeed_simpo.studies.plan.passes import Passes
from mindspeed_simpo.studies.plan.run_lengths import KINDS, RunLengths
from mindspeed_simpo.studies.plan.simulation import RECOMPUTE, Candidate, Simulator, StepTime
from mindspeed_simpo.studies.plan.work import PARTS


@dataclass(frozen=True)
class Forms:
    """Forms of micro-batches, and the mean passes that each makes of a run."""

    passes: Passes
    """``[form, kind]``, the kinds of :class:`MeanPasses`, in one row."""
    number: Float[np.ndarray, " form"]
    """Passes of a step."""
    again: Float[np.ndarray, " form"]
    """Passes that are scored before."""
    pairs: float
    """Pairs of a step."""

    @classmethod
    def of(cls, run: RunLengths, candidates: Sequence[Candidate]) -> Forms:
        """Those of some candidates with the same degrees."""
        means = [run.means(each.config, each.layout) for each in candidates]
        two_pass = [each.config.pair_schedule == "two_pass" for each in candidates]
        return cls(
            Passes.joined([mean.passes for mean in means]),
            np.array([mean.number for mean in means]),
            np.array([mean.again * twice for mean, twice in zip(means, two_pass, strict=True)]),
            means[0].pairs,
        )


@dataclass(frozen=True)
class Bounds:
    """The bounds of the forms of a layout."""

    busy: Float[np.ndarray, "rank part form"]
    """Seconds of all passes of each pipeline rank."""
    waits: Float[np.ndarray, "rank form"]
    """Seconds before the first and after the last of them."""
    once: dict[str, float]
    """Seconds beside the passes."""
    pairs: float

    @functools.cached_property
    def totals(self) -> list[float]:
        """Of each form."""
        found = (self.busy.sum(axis=1) + self.waits).max(axis=0) + sum(self.once.values())
        return [float(each) for each in found]

    def least(self) -> StepTime:
        """The least of all forms; the parts are those of the pipeline rank that decides it."""
        form = int(np.argmin(self.totals))
        rank = int((self.busy.sum(axis=1) + self.waits)[:, form].argmax())
        parts = dict(zip(PARTS, self.busy[rank, :, form].tolist(), strict=True))
        parts["pipeline"] = float(self.waits[rank, form])
        for name, value in self.once.items():
            parts[name] = parts.get(name, 0.0) + value
        return StepTime(sum(parts.values()), parts, self.pairs)


def bounds_of(simulator: Simulator, candidate: Candidate, forms: Forms) -> Bounds:
    """The bound of each form.

    Args:
        simulator: Of the model.
        candidate: Degrees, virtual stages and recomputation; its own form does not matter.
        forms: Forms of the passes of these degrees.
    """
    pipeline, once = candidate.layout.pipeline, simulator.of_step(candidate, rank=0)
    stages = simulator.stages(candidate, forms.passes)
    forward, backward = (_by_kind(each) for each in (stages.forward, stages.backward))
    busy = forms.number * (forward + backward)[..., 0]
    before = forward.sum(axis=1)
    busy[:, RECOMPUTE] += forms.again * before[..., 3]
    busy[:, RECOMPUTE] += candidate.config.reference_is_base * forms.number * before[..., 0]
    first, last = forward[:pipeline, ..., 1], backward[:pipeline, ..., 2]
    of_ranks = busy.reshape(-1, pipeline, *busy.shape[1:]).sum(axis=0)
    return Bounds(of_ranks, _before((first + last).sum(axis=1)), once, forms.pairs)


def interleaved_bounds(simulator: Simulator, candidate: Candidate, forms: Forms) -> Bounds:
    """Of all divisions of a candidate without virtual stages into virtual stages.

    The number of passes is then a multiple of the pipeline ranks, and all are as long as the longest. A virtual stage
    has at least one layer. Where layers differ, a rank may get others, so that only the mean over the ranks is known.
    """
    pipeline, once = candidate.layout.pipeline, simulator.of_step(candidate, rank=0)
    numbers = np.ceil(forms.number / pipeline) * pipeline
    stages = simulator.stages(candidate, forms.passes.at(slice(0, None, KINDS)).times(forms.number / numbers))
    times = stages.forward + stages.backward
    waits = _before(times.sum(axis=1)) * pipeline / simulator.model.num_layers
    if len(simulator.model.first_of_kind) > 1:
        times, waits = times.mean(axis=0, keepdims=True), np.zeros_like(waits[:1])
    return Bounds(numbers * times, waits, once, forms.pairs)


def _by_kind(times: np.ndarray) -> np.ndarray:
    return times.reshape(*times.shape[:2], -1, KINDS)


def _before(times: np.ndarray) -> np.ndarray:
    """Of each rank the sum over those before it."""
    found: np.ndarray = np.cumsum(times, axis=0) - times
    return found
