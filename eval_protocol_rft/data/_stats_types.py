"""`RolloutStats`: what `rollout_stats` finds out. It is plain data: `msgspec.json.encode` takes it.

Invariant: None where there is nothing to compute a number from, never 0.

Many numbers as the different values among them and how often each came. Pure.

Invariant: everything is computed from exact counts. A quantile is one of the values, never between
two of them.

The evaluator's own metrics, averaged where scores are.

Invariant: a mean is over the completions that have the metric with a valid, finite score; one that
the evaluator marked as not valid is in none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
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


@dataclass(frozen=True, slots=True)
class PassAtK:
    """The unbiased estimate of pass@k: Chen et al. 2021 (arXiv:2107.03374), equation 1."""

    k: int
    value: float
    """Mean over the data rows with at least k scored completions."""
    groups: int
    """How many those are."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why completions have no reward."""

    text: str | None
    """The first line of what the evaluator left, at most `REASON_CHARACTERS` of it. None: no word
    of it, as before scoring."""
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptStats:
    """The completions of one data row."""

    data_idx: int
    row_id: str
    prompt_start: str
    """The first `PROMPT_CHARACTERS` of the prompt, or of its last message."""
    completions: int
    """Asked for."""
    failed: int
    scored: int
    passed: int
    pass_rate: float | None
    """Of the scored ones."""
    mean_reward: float | None
    truncated: int
    mean_tokens: float | None
    """Sampled tokens of a completion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStats:
    """A rollout file in numbers."""

    path: str
    finished: bool
    """False where these are the parts of a job that is not done."""
    model: str | None
    reward: str
    """Column of the rewards."""
    pass_threshold: float
    """A completion passes where its reward is at least this."""
    completions: int
    """Asked for: failed + scored + unscored."""
    failed: int
    scored: int
    unscored: int
    """Sampled, without a reward."""
    truncated: int
    truncation_rate: float | None
    """Of the completions that were sampled."""
    tokens: int
    """Sampled tokens."""
    rewards: Distribution | None
    """Over scored completions."""
    lengths: Distribution | None
    """Sampled tokens, over completions that were sampled."""
    metrics: dict[str, float]
    """Mean of each of the evaluator's own metrics, over the completions for which it is valid."""
    pass_at_k: list[PassAtK]
    """For every k up to the most scored completions of a data row."""
    failures: dict[str, int]
    """Kind -> failed completions, the most frequent first."""
    unscored_reasons: list[Reason]
    """The most frequent first, at most `TOP_REASONS`."""
    groups: int
    """Data rows."""
    groups_all_passed: int
    """All scored completions passed, and there are some."""
    groups_none_passed: int
    groups_mixed: int
    groups_unscored: int
    """No completion has a reward."""
    per_group: list[PromptStats]
    """Hardest first: by pass rate, then mean reward, then place in the file. Data rows without a
    reward come last."""


REASON_CHARACTERS = 200
PROMPT_CHARACTERS = 80
TOP_REASONS = 10


class MetricMeans:
    """Metrics of completions go in one by one; their means stay."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, metrics: Mapping[str, Any] | None) -> None:
        """Take the metrics of one completion: name -> a number, or an object with `score` and
        `is_score_valid`."""
        for name, metric in (metrics or {}).items():
            score = metric
            if isinstance(metric, Mapping):
                score = None if metric.get("is_score_valid") is False else metric.get("score")
            number = isinstance(score, int | float) and not isinstance(score, bool)
            if number and math.isfinite(score):
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + score, count + 1)

    def add_json(self, texts: Iterable[str | None]) -> None:
        """Take JSON texts, as rollout files hold them."""
        for text in texts:
            if text is not None:
                self.add(msgspec.json.decode(text))

    @property
    def means(self) -> dict[str, float]:
        """By name."""
        return {name: total / count for name, (total, count) in sorted(self._sums.items())}
