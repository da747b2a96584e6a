"""Many numbers as the different values among them and how often each came. Pure.

Invariant: everything is computed from exact counts. A quantile is one of the values, never between
two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

BARS = 20
"""Most bars of a histogram: up to so many different values each have their own."""


@dataclass(frozen=True, slots=True)
class Bar:
    """How many numbers lie in [low, high), of the last bar in [low, high]. Where both are the same,
    how many are exactly that."""

    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """How numbers are spread."""

    count: int
    mean: float
    std: float
    """Population deviation (ddof 0)."""
    min: float
    max: float
    quantiles: dict[str, float]
    """ "p90" -> the least value with at least 90 % of the numbers at or below it."""
    histogram: list[Bar]
    """Up to `BARS` different values: a bar each. More: `BARS` bars of equal width."""


def distribution(
    values: ArrayLike, counts: ArrayLike, *, percents: Sequence[int]
) -> Distribution | None:
    """How numbers are spread; None where there are none.

    Args:
        values: [V] different finite values, rising.
        counts: [V] how often each came, at least once.
        percents: which quantiles, each in [0, 100].
    """
    points, times = np.asarray(values, np.float64), np.asarray(counts, np.int64)
    if not len(points):
        return None
    total = int(times.sum())
    mean = float(np.average(points, weights=times))
    variance = float(np.average((points - mean) ** 2, weights=times))
    upto = np.cumsum(times)
    # In whole numbers: 0.07 * 100 is more than 7 in floating point.
    ranks = {percent: max(-(-percent * total // 100), 1) for percent in percents}
    return Distribution(
        count=total,
        mean=mean,
        std=variance**0.5,
        min=float(points[0]),
        max=float(points[-1]),
        quantiles={
            f"p{percent}": float(points[np.searchsorted(upto, rank)])
            for percent, rank in ranks.items()
        },
        histogram=_bars(points, times),
    )


def _bars(points: np.ndarray, times: np.ndarray) -> list[Bar]:
    if len(points) <= BARS:
        pairs = zip(points.tolist(), times.tolist(), strict=True)
        return [Bar(value, value, count) for value, count in pairs]
    counts, edges = np.histogram(points, bins=BARS, weights=times)
    lows, highs = edges[:-1].tolist(), edges[1:].tolist()
    triples = zip(lows, highs, counts.tolist(), strict=True)
    return [Bar(low, high, int(count)) for low, high, count in triples]
