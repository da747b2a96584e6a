"""Numbers of a report. They are of all prompts, whichever the page shows in full.

Invariant: an unscored completion counts as unscored, never as 0; a failed one as failed, and in no
mean. Of a completion no more than a few numbers stay in memory.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.data import UNSCORED, CompletionRow, MetricMeans
from eval_protocol_rft.scoring import pass_at_k
from eval_protocol_rft.training import LARGEST


class ReportError(ValueError):
    """The report cannot be made; the message says what is in the way and where."""


def broken(row: CompletionRow, problem: str) -> ReportError:
    """The error that a completion is for which the file breaks its format."""
    return ReportError(
        f"row {row.data_idx} ({row.row_id!r}), completion {row.sample_idx}: {problem}. "
        "The file breaks its format: make it anew, or leave this row out"
    )


@dataclass(frozen=True, slots=True)
class GroupRewards:
    """What one reward column says of a prompt group."""

    rewards: tuple[float, ...]
    """Of scored completions."""
    passed: int

    @property
    def scored(self) -> int:
        return len(self.rewards)

    @property
    def mean(self) -> float | None:
        return math.fsum(self.rewards) / len(self.rewards) if self.rewards else None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStats:
    """The numbers of one prompt group."""

    size: int
    """Completions asked for."""
    failed: int
    truncated: int
    episodes: int
    """Completions of several turns."""
    lengths: tuple[tuple[int, bool], ...]
    """Sampled tokens of each completion that did not fail, and whether it was truncated."""
    columns: Mapping[str, GroupRewards]

    @property
    def tokens(self) -> int:
        return sum(length for length, _ in self.lengths)

    @property
    def mean_length(self) -> float | None:
        return self.tokens / len(self.lengths) if self.lengths else None


@dataclass(frozen=True, slots=True)
class PassPoint:
    """One point of the pass@k curve."""

    k: int
    estimate: float
    prompts: int
    """Prompts with at least k scored completions, which the estimate is the mean over."""


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


def group_stats(
    group: Sequence[CompletionRow],
    columns: Iterable[str],
    *,
    pass_threshold: float,
    episodes: Mapping[int, tuple[int, bool]] | None = None,
) -> GroupStats:
    """The numbers of the completions of one prompt.

    Args:
        group: in the order of `sample_idx`.
        columns: reward columns.
        pass_threshold: reward from which on a completion counts as passed.
        episodes: `sample_idx` -> sampled tokens of all turns and whether the last one was
            truncated, of completions whose rows hold the first turn alone.
    """
    episodes = episodes or {}
    survivors = [row for row in group if not row.failed]
    rewards = {
        column: tuple(r for row in survivors if (r := finite_reward(row, column)) is not None)
        for column in columns
    }
    lengths = tuple(
        episodes.get(row.sample_idx, (row.num_tokens, bool(row.truncated))) for row in survivors
    )
    return GroupStats(
        size=len(group),
        failed=len(group) - len(survivors),
        truncated=sum(truncated for _, truncated in lengths),
        episodes=len(episodes),
        lengths=lengths,
        columns={
            column: GroupRewards(values, sum(value >= pass_threshold for value in values))
            for column, values in rewards.items()
        },
    )


@dataclass(slots=True)
class ColumnTotals:
    """One reward column over all prompt groups."""

    values: array[float] = field(default_factory=lambda: array("d"))
    groups: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(scored, passed) -> prompts with these numbers."""
    metrics: MetricMeans = field(default_factory=MetricMeans)
    """What the evaluator measured beside the reward."""

    def add(self, rewards: GroupRewards) -> None:
        self.values.extend(rewards.rewards)
        self.groups[rewards.scored, rewards.passed] += 1

    @property
    def rewards(self) -> NDArray[np.float64]:
        return np.array(self.values)

    @property
    def mean(self) -> float | None:
        return math.fsum(self.values) / len(self.values) if self.values else None

    def pass_curve(self) -> list[PassPoint]:
        """pass@k for every k up to the most scored completions of a prompt, each the mean over the
        prompts that have k of them."""
        counts = np.array([[n, c, times] for (n, c), times in self.groups.items()]).reshape(-1, 3)
        points = []
        for k in range(1, int(counts[:, 0].max(initial=0)) + 1):
            n, c, times = counts[counts[:, 0] >= k].T
            estimate = float(np.average(pass_at_k(n, c, k), weights=times))
            points.append(PassPoint(k, estimate, int(times.sum())))
        return points


@dataclass(slots=True)
class ReportTotals:
    """Sums over prompt groups, one added after the other."""

    columns: dict[str, ColumnTotals]
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
    """(sampled tokens, truncated) -> completions."""

    def add(self, stats: GroupStats) -> None:
        self.prompts += 1
        self.completions += stats.size
        self.failed += stats.failed
        self.truncated += stats.truncated
        self.episodes += stats.episodes
        self.tokens += stats.tokens
        self.lengths.update(stats.lengths)
        for column, rewards in stats.columns.items():
            self.columns[column].add(rewards)

    def unscored(self, column: str) -> int:
        """Completions that did not fail and have no reward."""
        return self.completions - self.failed - len(self.columns[column].values)
