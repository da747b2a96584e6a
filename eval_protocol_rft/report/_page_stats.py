"""Numbers of a report. They are of all prompts, whichever the page shows in full.

Invariant: an unscored completion counts as unscored, never as 0; a failed one as failed, and in no
mean. Every value is counted in exactly one bin. Of a completion no more than a few numbers stay in
memory.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft._statistics import LARGEST, MetricMeans, PassAtK, mean_pass_at_k
from eval_protocol_rft.data import UNSCORED, CompletionRow
from eval_protocol_rft.report._html import ReportError

_MOST_SINGLE_VALUES = 12
"""Up to so many different rewards each get a bin of their own."""
_BINS = 20


def broken(row: CompletionRow, problem: str) -> ReportError:
    """The error that a completion is for which the file breaks its format."""
    return ReportError(
        f"row {row.data_idx} ({row.row_id!r}), completion {row.sample_idx}: {problem}. "
        "The file breaks its format: make it anew, or leave this row out"
    )


def finite_reward(row: CompletionRow, column: str) -> float | None:
    """The reward, None where there is none or it is no finite number.

    Raises:
        ReportError: it is too large to be summed up.
    """
    reward = row.scores.get(column, UNSCORED).reward
    if reward is None or not math.isfinite(reward):
        return None
    if abs(reward) > LARGEST:
        raise broken(row, f"{column} is {reward:g}, beyond {LARGEST:g}")
    return reward


@dataclass(slots=True)
class ColumnTotals:
    """One reward column over all prompt groups."""

    values: array[float] = field(default_factory=lambda: array("d"))
    groups: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(scored, passed) -> prompts with these numbers."""
    metrics: MetricMeans = field(default_factory=MetricMeans)
    """What the evaluator measured beside the reward."""

    def add(self, rewards: Sequence[float], threshold: float) -> dict[str, Any]:
        """Count the scored completions of one prompt; what its line in the table says of them."""
        passed = sum(reward >= threshold for reward in rewards)
        self.values.extend(rewards)
        self.groups[len(rewards), passed] += 1
        mean = math.fsum(rewards) / len(rewards) if rewards else None
        return {"scored": len(rewards), "passed": passed, "mean": mean}

    @property
    def rewards(self) -> NDArray[np.float64]:
        return np.array(self.values)

    @property
    def mean(self) -> float | None:
        return math.fsum(self.values) / len(self.values) if self.values else None

    def pass_curve(self) -> list[PassAtK]:
        """pass@k for every k up to the most scored completions of a prompt, each the mean over the
        prompts that have k of them."""
        pairs = np.array(list(self.groups), np.int64).reshape(-1, 2)
        return mean_pass_at_k(*pairs.T, times=list(self.groups.values()))


@dataclass(slots=True)
class ReportTotals:
    """Sums over prompt groups, one added after the other."""

    columns: dict[str, ColumnTotals]
    pass_threshold: float
    """Reward from which on a completion counts as passed."""
    prompts: int = 0
    completions: int = 0
    """Asked for, failed ones included."""
    failed: int = 0
    truncated: int = 0
    episodes: int = 0
    """Completions of several turns."""
    tokens: int = 0
    """Sampled."""
    lengths: Counter[tuple[int, bool]] = field(default_factory=Counter)
    """(sampled tokens, truncated) -> completions that did not fail."""

    def add(self, group: Sequence[CompletionRow]) -> dict[str, Any]:
        """Count the completions of one prompt, in the order of `sample_idx`; what its line in the
        table says of them."""
        survivors = [row for row in group if not row.failed]
        lengths = [(row.num_tokens, bool(row.truncated)) for row in survivors]
        tokens, truncated = sum(n for n, _ in lengths), sum(cut for _, cut in lengths)
        self.prompts += 1
        self.completions += len(group)
        self.failed += len(group) - len(survivors)
        self.truncated += truncated
        self.episodes += sum(row.episode is not None for row in survivors)
        self.tokens += tokens
        self.lengths.update(lengths)
        columns = []
        for name, column in self.columns.items():
            rewards = [r for row in survivors if (r := finite_reward(row, name)) is not None]
            columns.append(column.add(rewards, self.pass_threshold))
            for row in group:
                column.metrics.add(row.scores.get(name, UNSCORED).metrics)
        return {
            "size": len(group),
            "failed": len(group) - len(survivors),
            "truncated": truncated,
            "mean_length": tokens / len(lengths) if lengths else None,
            "columns": columns,
        }

    def unscored(self, column: str) -> int:
        """Completions that did not fail and have no reward."""
        return self.completions - self.failed - len(self.columns[column].values)


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
