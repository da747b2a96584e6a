"""Values counted in bins for the page's histograms. Pure.

Invariant: every value is in exactly one bin.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MOST_SINGLE_VALUES = 12
"""Up to so many different values each get a bin of their own."""
_BINS = 20


@dataclass(frozen=True, slots=True)
class Bin:
    """How many values v lie in low <= v < high, or equal low where both are the same."""

    low: float
    high: float
    count: int
    marked: int = 0
    """Those of `count` to set apart."""


def reward_bins(rewards: NDArray[np.float64]) -> list[Bin]:
    """Each value by itself where there are few, else bins of one width with round edges."""
    values, counts = np.unique(rewards, return_counts=True)
    if len(values) <= _MOST_SINGLE_VALUES:
        return [Bin(float(v), float(v), int(n)) for v, n in zip(values, counts, strict=True)]
    edges = _edges(float(values[0]), float(values[-1]))
    place = np.searchsorted(edges, values, side="right") - 1
    totals = np.bincount(place, weights=counts, minlength=len(edges) - 1)
    return [
        Bin(low, high, int(total))
        for low, high, total in zip(edges[:-1], edges[1:], totals, strict=True)
    ]


def length_bins(lengths: Mapping[tuple[int, bool], int]) -> list[Bin]:
    """Bins of whole numbers, all of one width; `marked` counts truncated completions.

    Args:
        lengths: (tokens, truncated) -> completions.
    """
    if not lengths:
        return []
    low = min(length for length, _ in lengths)
    high = max(length for length, _ in lengths)
    step = max(1, round(nice_step(high - low + 1, _BINS)))
    start = low // step * step
    totals = [[0, 0] for _ in range((high - start) // step + 1)]
    for (length, truncated), count in lengths.items():
        totals[(length - start) // step][truncated] += count
    return [
        Bin(start + i * step, start + (i + 1) * step, whole + cut, cut)
        for i, (whole, cut) in enumerate(totals)
    ]


def nice_step(span: float, parts: int) -> float:
    """The smallest of 1, 2, 5, 10, ... times a power of ten of which `parts` span at least `span`;
    1 where there is nothing to span, or too little for a float to be divided exactly."""
    least = span / parts
    if least < sys.float_info.min:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10, 20) if m * power >= least * (1 - 1e-9))


def _edges(low: float, high: float) -> list[float]:
    """Bin edges from at most `low` to above `high`, round where floats allow it."""
    step = nice_step(high - low, _BINS)
    digits = max(0, -math.floor(math.log10(step)))
    first, last = math.floor(low / step), math.floor(high / step)
    # Rounded, so that the edge at 0.3 is the number that a reward of 0.3 is.
    edges = [round(i * step, digits) for i in range(first - 1, last + 3)]
    below = [edge for edge in edges if edge <= low]
    within = sorted({edge for edge in edges if low < edge <= high})
    above = [edge for edge in edges if edge > high]
    return [
        below[-1] if below else low,
        *within,
        above[0] if above else math.nextafter(high, math.inf),
    ]
