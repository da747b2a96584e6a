"""The evaluator's own metrics, averaged where scores are.

Invariant: a mean is over the completions that have the metric with a valid, finite score; one that
the evaluator marked as not valid is in none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec


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
