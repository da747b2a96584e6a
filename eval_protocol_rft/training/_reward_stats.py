"""Statistics of reward arrays with missing values, for the advantage estimators.

Invariant: NaN means missing and nothing else. It takes no part in a statistic and never comes out
of one: where nothing is there, a mean is 0.0. `axis=None` is the whole array as one batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

LARGEST = 1e150
"""Rewards beyond this overflow when squared, and a deviation of infinity is NaN further on."""

ROUNDING = 1e-7
"""Relative; the distance of two neighbours in float32 is up to 1.2e-7."""
_NOTHING = 1e-12
"""What sums that should be 0 come to."""


def read(rewards: ArrayLike) -> Array:
    """[..., G] float64, NaN for None.

    Raises:
        ValueError: not an array of numbers, or a reward is infinite or too large to be squared.
    """
    values = np.array(rewards, dtype=np.float64)
    if values.ndim == 0:
        raise ValueError("rewards must have a group axis: an array [..., G], not a number")
    wrong = np.abs(values) > LARGEST
    if wrong.any():
        place = [int(i) for i in np.argwhere(wrong)[0]]
        raise ValueError(
            f"rewards{place} is {values[tuple(place)]}: rewards must be finite, and at most "
            f"{LARGEST:g} in size"
        )
    return values


def count(values: Array, *, axis: int | None = -1) -> Array:
    """How many are not missing; the axis is kept with length 1, as in all that follows."""
    return np.asarray(np.sum(~np.isnan(values), axis=axis, keepdims=True, dtype=np.float64))


def low(values: Array, *, axis: int | None = -1) -> Array:
    there = ~np.isnan(values)
    return np.asarray(np.min(values, axis=axis, keepdims=True, initial=np.inf, where=there))


def high(values: Array, *, axis: int | None = -1) -> Array:
    there = ~np.isnan(values)
    return np.asarray(np.max(values, axis=axis, keepdims=True, initial=-np.inf, where=there))


def mean(values: Array, *, axis: int | None = -1) -> Array:
    total = np.nansum(values, axis=axis, keepdims=True)
    return np.asarray(total / np.maximum(count(values, axis=axis), 1.0))


def equal(low: Array, high: Array) -> NDArray[np.bool_]:
    """Whether rewards that lie between `low` and `high` are the same number but for rounding: sums
    of the same parts in another order, or values that were float32 on their way."""
    return np.asarray(high - low <= ROUNDING * np.maximum(abs(low), abs(high)) + _NOTHING)


def center(values: Array, *, axis: int | None = -1) -> Array:
    """values - mean in the shape of `values`; exactly 0.0 where all are `equal`, and where missing.

    Rewards that mean the same can differ in their last digits, as can the mean of equal ones from
    them, and dividing that noise by a small epsilon would make an advantage of it.
    """
    same = equal(low(values, axis=axis), high(values, axis=axis))
    return np.where(same, 0.0, zero_missing(values - mean(values, axis=axis)))


def deviation(centered: Array, values: Array, *, axis: int | None = -1, ddof: int) -> Array:
    """Standard deviation of `values`, whose `center` is `centered`; 0.0 for fewer than two."""
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    squares = np.sum(centered * centered, axis=axis, keepdims=True)
    return np.asarray(np.sqrt(squares / np.maximum(count(values, axis=axis) - ddof, 1.0)))


def divide(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, and 0.0 where the denominator is 0."""
    zero = denominator == 0
    return np.where(zero, 0.0, numerator / np.where(zero, 1.0, denominator))


def zero_missing(values: Array) -> Array:
    return np.where(np.isnan(values), 0.0, values)
