"""The numbers of an analysis: plain functions of arrays, written to ``analysis.json`` as they are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from mindspeed_simpo.studies.analysis.scores import Numbers

BINS = 10, 60
"""Bars of a histogram, at least and at most."""
LENGTH_GROUPS = 10
"""Groups of pairs by length difference, at most."""
_GROUP = 8
"""Pairs of such a group, at least, where there are so many."""
GRID = 40
"""Cells of a density along each axis."""
_TAIL = 0.25
"""Per cent of the values at either end that the outermost bars of a histogram hold at most."""
_QUANTILES = (1, 5, 25, 50, 75, 95, 99)
_Z = 1.959963984540054  # the 97.5th percentile of the normal distribution


def average_ranks(values: Float[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Float64[np.ndarray, " n"] = (last - (counts - 1) / 2)[inverse]
    return ranks


def spearman(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"]) -> float | None:
    r"""Spearman's rank correlation: Pearson's correlation of the :func:`average_ranks`.

    ``rho = cov(R(x), R(y)) / (sd(R(x)) sd(R(y)))``, the definition that holds with ties.

    Returns:
        From -1 to 1; None where it is not defined: fewer than two values, or all values of a side equal.
    """
    if len(first) < 2:
        return None
    ranks = [average_ranks(each) for each in (first, second)]
    centred = [each - each.mean() for each in ranks]
    scale = math.sqrt(float(np.square(centred[0]).sum() * np.square(centred[1]).sum()))
    return float((centred[0] * centred[1]).sum()) / scale if scale else None


def accuracy(right: Bool[np.ndarray, " n"]) -> Numbers:
    """Share of right pairs, with Wilson's 95 % interval.

    ``(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`` with ``z = 1.96``; it stays between 0 and 1 and holds
    for few pairs too (Wilson 1927).

    Returns:
        ``pairs``, ``right``, ``accuracy`` and ``interval``; the last two are None without pairs.
    """
    number, hits = len(right), int(np.count_nonzero(right))
    if not number:
        return {"pairs": 0, "right": 0, "accuracy": None, "interval": None}
    share, square = hits / number, _Z**2 / number
    centre = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / number + square / (4 * number)) / (1 + square)
    # at the ends the interval touches 0 or 1, rounding aside
    interval = [max(0.0, centre - half) if hits else 0.0, min(1.0, centre + half) if hits < number else 1.0]
    return {"pairs": number, "right": hits, "accuracy": share, "interval": interval}


def accuracy_by_length(right: Bool[np.ndarray, " n"], difference: Float[np.ndarray, " n"]) -> list[Numbers]:
    """:func:`accuracy` in groups of about equal size, in ascending order of the length difference.

    Args:
        right: Whether the model ranks the pair as the data do.
        difference: Tokens of the chosen minus tokens of the rejected response, whole numbers.

    Returns:
        For each group ``from`` and ``to``, the smallest and the largest difference in it, and its accuracy. Pairs of
        equal difference are in one group.
    """
    groups = min(LENGTH_GROUPS, max(1, len(difference) // _GROUP))
    edges = np.unique(np.quantile(difference, np.linspace(0, 1, groups + 1)[1:-1], method="lower"))
    number = np.searchsorted(edges, difference, side="left")
    found = []
    for group in np.unique(number):
        inside = number == group
        low, high = int(difference[inside].min()), int(difference[inside].max())
        found.append({"from": low, "to": high, **accuracy(right[inside])})
    return found


def accuracy_by_source(
    right: Bool[np.ndarray, " n"], source_of: Int64[np.ndarray, " n"], names: Sequence[str]
) -> list[Numbers]:
    """:func:`accuracy` of the pairs of each source, in the order of ``names``."""
    return [{"source": name, **accuracy(right[source_of == number])} for number, name in enumerate(names)]


def distribution(values: Float[np.ndarray, " n"], limits: tuple[float, float] | None = None) -> Numbers:
    """Mean, standard deviation, quantiles and histogram.

    Args:
        values: At least one, finite.
        limits: First and last edge of the histogram; the outermost bars also hold what lies beyond. None for
            :func:`limits_of` the values.
    """
    low, high = limits or limits_of(values)
    bars = min(max(BINS[0], round(2 * math.sqrt(len(values)))), BINS[1])
    edges = np.linspace(low, high, bars + 1)
    counts, _ = np.histogram(values.clip(low, high), edges)
    return {
        "mean": float(values.mean()),
        "standard_deviation": float(values.std()),
        "quantiles": {str(each): float(np.percentile(values, each)) for each in _QUANTILES},
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def limits_of(*values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Limits of a histogram: without the outermost quarter of a per cent of the values at either end."""
    low, high = (float(each) for each in np.percentile(np.concatenate(values), (_TAIL, 100 - _TAIL)))
    if high - low > 1e-12 * max(1.0, abs(low), abs(high)):
        return low, high
    return low - 0.5, high + 0.5


def density(lengths: Float[np.ndarray, " n"], means: Float[np.ndarray, " n"]) -> Numbers:
    """Number of responses by length (logarithmic cells) and average log-probability."""
    low, high = limits_of(np.log10(lengths))
    across, upward = limits_of(means)
    counts, x_edges, y_edges = np.histogram2d(
        np.log10(lengths).clip(low, high),
        means.clip(across, upward),
        bins=(np.linspace(low, high, GRID + 1), np.linspace(across, upward, GRID + 1)),
    )
    return {
        "length_edges": (10**x_edges).tolist(),
        "mean_logprob_edges": y_edges.tolist(),
        "counts": counts.astype(int).tolist(),
    }


def contingency(right: Bool[np.ndarray, " n"], likelier: Bool[np.ndarray, " n"]) -> Numbers:
    """The four numbers of pairs by the ranking of the rewards and by that of the likelihoods.

    Args:
        right: Whether ``r(x, y_w) > r(x, y_l)``.
        likelier: Whether ``log p(y_w | x) / |y_w| > log p(y_l | x) / |y_l|``.
    """
    return {
        "both_right": int(np.count_nonzero(right & likelier)),
        "reward_right_only": int(np.count_nonzero(right & ~likelier)),
        "likelihood_right_only": int(np.count_nonzero(~right & likelier)),
        "both_wrong": int(np.count_nonzero(~right & ~likelier)),
        "disagreement": float(np.mean(right != likelier)),
    }


def extremes(margin: Float[np.ndarray, " n"], number: int) -> tuple[list[int], list[int]]:
    """Positions of the hardest pairs, smallest margin first, and of the most confident ones, largest margin first.

    Args:
        margin: Reward margin of each pair.
        number: How many of either kind, at most; no pair is of both kinds.
    """
    order = np.argsort(margin, kind="stable").tolist()
    number = min(number, max(1, len(order) // 2))
    return order[:number], [each for each in order[::-1][:number] if each not in order[:number]]
