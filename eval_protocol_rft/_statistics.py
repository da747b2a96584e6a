"""Numbers of many completions: rewards, pass@k, lengths, the evaluator's metrics. Pure numpy.

Invariant: what is missing takes no part in a statistic, and where there is nothing to compute a
number from there is None, or no entry, never 0. An unscored completion is not one with reward 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, overload

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


@overload
def pass_at_k(num_completions: int, num_correct: int, k: int) -> float: ...
@overload
def pass_at_k(num_completions: ArrayLike, num_correct: ArrayLike, k: ArrayLike) -> Array: ...
def pass_at_k(num_completions: ArrayLike, num_correct: ArrayLike, k: ArrayLike) -> Array | float:
    """Unbiased estimate of pass@k, the chance that at least one of k completions, drawn from those
    sampled, is correct: 1 - C(n - c, k) / C(n, k).

    Equation 1 of Chen et al. 2021, "Evaluating Large Language Models Trained on Code"
    (arXiv:2107.03374), with n completions sampled for a problem, c of them correct.

    Args:
        num_completions: n, integers of any shape that broadcasts with the others.
        num_correct: c, between 0 and n.
        k: completions drawn without replacement, between 1 and n.

    Returns:
        The estimate, in [0, 1], in the broadcast shape; a float where all three are scalars.

    Raises:
        ValueError: a value is not an integer, c is outside [0, n] or k outside [1, n]; the message
            names the first such place.
    """
    n, c, ks = np.broadcast_arrays(
        _integers("num_completions", num_completions),
        _integers("num_correct", num_correct),
        _integers("k", k),
    )
    _refuse("num_correct must lie between 0 and num_completions", (c < 0) | (c > n), n, c, ks)
    _refuse("k must lie between 1 and num_completions", (ks < 1) | (ks > n), n, c, ks)
    if not n.size:
        return np.zeros(n.shape)
    wrong = np.take_along_axis(_all_wrong(n, c, int(ks.max())), ks[..., None] - 1, axis=-1)
    estimate: Array = 1.0 - wrong[..., 0]
    return float(estimate) if estimate.ndim == 0 else estimate


def _all_wrong(n: Ints, c: Ints, most: int) -> Array:
    """[..., most] the chance that 1, 2, ... draws are all wrong. As a product of ratios it neither
    overflows nor loses digits for large n; what stands beyond the n-th draw means nothing."""
    drawn = np.arange(most)
    wrong_left = np.maximum(n[..., None] - c[..., None] - drawn, 0)
    return np.cumprod(wrong_left / np.maximum(n[..., None] - drawn, 1), axis=-1)


def _integers(name: str, values: ArrayLike) -> Ints:
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    return array.astype(np.int64)


def _refuse(rule: str, broken: NDArray[np.bool_], n: Ints, c: Ints, k: Ints) -> None:
    if not broken.any():
        return
    place = tuple(int(i) for i in np.argwhere(broken)[0])
    where = f" at {list(place)}" if place else ""
    raise ValueError(
        f"{rule}{where}: num_completions={n[place]}, num_correct={c[place]}, k={k[place]}"
    )


@dataclass(frozen=True, slots=True)
class PassAtK:
    """pass@k over prompt groups."""

    k: int
    value: float
    """Mean over the groups with at least k scored completions."""
    groups: int
    """How many those are."""


def group_starts(groups: NDArray[Any]) -> Ints:
    """[P] where each group begins among [N] completions, of which those of a group stand together
    and have its id."""
    return np.flatnonzero(np.append(len(groups) > 0, groups[1:] != groups[:-1]))


def group_numbers(
    groups: NDArray[Any],
    *,
    rewards: Array,
    tokens: Ints,
    failed: NDArray[np.bool_],
    truncated: NDArray[np.bool_],
    pass_threshold: float,
) -> dict[str, NDArray[Any]]:
    """The numbers of P prompt groups.

    Args:
        groups: [N] of which group each completion is; those of a group stand together.
        rewards: [N] finite, NaN where a completion has none.
        tokens: [N] sampled tokens, 0 of failed ones.
        failed: [N] whether there is no completion.
        truncated: [N] whether it was cut off at max_tokens.
        pass_threshold: a completion passes where its reward is at least this.

    Returns:
        Name -> [P]: `num_completions` asked for, `num_failed`, `num_scored`, `num_passed`,
        `num_truncated`, `num_tokens`; `pass_rate` (of the scored ones), `mean_reward`,
        `min_reward`, `max_reward`, which are NaN where nothing is scored.
    """
    starts = group_starts(groups)
    if not len(starts):
        return {name: np.zeros(0) for name in GROUP_NUMBERS}
    sizes = np.diff(starts, append=len(groups))

    def count(flags: NDArray[Any]) -> Ints:
        return np.asarray(np.add.reduceat(flags, starts, dtype=np.int64))

    # Sorted within each group, so that equal rewards sum up alike in whatever order they came; NaN
    # goes last.
    ordered = rewards[np.lexsort((rewards, np.repeat(np.arange(len(starts)), sizes)))]
    scored, passed = count(~np.isnan(ordered)), count(ordered >= pass_threshold)
    least, most = ordered[starts], ordered[starts + np.maximum(scored, 1) - 1]
    total = np.add.reduceat(np.where(np.isnan(ordered), 0.0, ordered), starts)
    numbers = (
        sizes,
        count(failed),
        scored,
        passed,
        count(truncated),
        count(tokens),
        _share(passed, scored),
        # The mean of equal floats can miss them by the last digit, and would break a tie.
        np.clip(_share(total, scored), least, most),
        least,
        most,
    )
    return dict(zip(GROUP_NUMBERS, numbers, strict=True))


GROUP_NUMBERS = (
    "num_completions", "num_failed", "num_scored", "num_passed", "num_truncated", "num_tokens",
    "pass_rate", "mean_reward", "min_reward", "max_reward",
)  # fmt: skip
"""What `group_numbers` tells, in its order."""


def _share(values: Array | Ints, of: Ints) -> Array:
    return np.where(of > 0, values / np.maximum(of, 1), np.nan)


def count_passes(groups: Sequence[ArrayLike], threshold: float) -> tuple[Ints, Ints]:
    """How many completions of each of P groups are scored, and how many passed.

    Args:
        groups: [P] the rewards of each, NaN where there is none.
        threshold: a completion passes where its reward is at least this.
    """
    rewards = [np.asarray(group, np.float64) for group in groups]
    scored = np.array([np.sum(~np.isnan(group)) for group in rewards], np.int64)
    return scored, np.array([np.sum(group >= threshold) for group in rewards], np.int64)


def mean_pass_at_k(
    scored: ArrayLike,
    passed: ArrayLike,
    ks: Iterable[int] | None = None,
    *,
    times: ArrayLike | None = None,
) -> list[PassAtK]:
    """pass@k of groups of any size, for each k that some group has completions for.

    Args:
        scored: [P] scored completions of each group.
        passed: [P] those that passed.
        ks: which k; default 1, 2, ... up to the most scored completions of a group.
        times: [P] how many groups have these numbers; default one each.
    """
    n, c = np.asarray(scored, np.int64), np.asarray(passed, np.int64)
    most = int(n.max(initial=0))
    weights = np.ones(len(n), np.int64) if times is None else np.asarray(times, np.int64)
    # Groups with the same numbers have the same estimates, and there are few different ones.
    pairs, which = np.unique(np.stack([n, c], axis=1), axis=0, return_inverse=True)
    counts = np.bincount(which.reshape(-1), weights, minlength=len(pairs))
    estimates = 1.0 - _all_wrong(pairs[:, 0], pairs[:, 1], most)
    curve = []
    for k in range(1, most + 1) if ks is None else (k for k in ks if 1 <= k <= most):
        enough = pairs[:, 0] >= k
        value = np.average(estimates[enough, k - 1], weights=counts[enough])
        curve.append(PassAtK(k, float(value), int(counts[enough].sum())))
    return curve


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [1 << i for i in range(int(most).bit_length())]


def count_outcomes(
    scored: ArrayLike, passed: ArrayLike, *, times: ArrayLike | None = None
) -> dict[str, int]:
    """How many groups have all, some (`mixed`) or none of their scored completions passed, and how
    many have none scored (`unscored`); arguments as in `mean_pass_at_k`."""
    n, c = np.asarray(scored, np.int64), np.asarray(passed, np.int64)
    weights = np.ones(len(n), np.int64) if times is None else np.asarray(times, np.int64)
    outcomes = {
        "all": (n > 0) & (c == n),
        "mixed": (c > 0) & (c < n),
        "none": (n > 0) & (c == 0),
        "unscored": n == 0,
    }
    return {name: int(weights[which].sum()) for name, which in outcomes.items()}


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


def _bars(points: Array, times: Ints) -> list[Bar]:
    if len(points) <= BARS:
        pairs = zip(points.tolist(), times.tolist(), strict=True)
        return [Bar(value, value, count) for value, count in pairs]
    counts, edges = np.histogram(points, bins=BARS, weights=times)
    lows, highs = edges[:-1].tolist(), edges[1:].tolist()
    triples = zip(lows, highs, counts.tolist(), strict=True)
    return [Bar(low, high, int(count)) for low, high, count in triples]


def percentile(ordered: Array, q: float) -> float:
    """The q-th percentile, in [0, 100], of rising numbers, at least one; between two of them in
    proportion.

    The place is computed exactly: in floating point 0.07 * 100 is more than 7, and the percentile
    would miss the number that it is.
    """
    place = Fraction(str(q)) / 100 * (len(ordered) - 1)
    first = math.floor(place)
    value, rest = float(ordered[first]), float(place - first)
    return value + (float(ordered[first + 1]) - value) * rest if rest else value


def metric_score(metric: Any) -> Any:
    """The score of a metric: the number itself, or what an object has for `score` unless it says
    that `is_score_valid` is false."""
    if not isinstance(metric, Mapping):
        return metric
    return None if metric.get("is_score_valid") is False else metric.get("score")


class MetricMeans:
    """Metrics of completions go in one by one; their means stay. A mean is over the completions
    that have the metric with a valid, finite score."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, metrics: Mapping[str, Any] | None, times: int = 1) -> None:
        """Take the metrics of one completion, or of several with the same: name -> a number, or an
        object with `score` and `is_score_valid`."""
        for name, metric in (metrics or {}).items():
            score = metric_score(metric)
            number = isinstance(score, int | float) and not isinstance(score, bool)
            if number and math.isfinite(score):
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + times * score, count + times)

    def add_json(self, text: str | None, times: int = 1) -> None:
        """Take JSON text, as rollout files hold it."""
        if text is not None:
            self.add(msgspec.json.decode(text), times)

    @property
    def means(self) -> dict[str, float]:
        """By name."""
        return {name: total / count for name, (total, count) in sorted(self._sums.items())}


# What follows is for arrays of rewards [..., G] in which NaN stands for a missing one, and for
# nothing else. A statistic keeps its axis with length 1; `axis=None` is the whole array as one
# batch. The mean of nothing is 0.0 here: it is subtracted from nothing.

LARGEST = 1e150
"""Rewards beyond this overflow when squared, and a deviation of infinity is NaN further on."""

ROUNDING = 1e-7
"""Relative; the distance of two neighbours in float32 is up to 1.2e-7."""
NOTHING = 1e-12
"""What sums that should be 0 come to."""


def read_rewards(rewards: ArrayLike) -> Array:
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
    return np.asarray(high - low <= ROUNDING * np.maximum(abs(low), abs(high)) + NOTHING)


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
