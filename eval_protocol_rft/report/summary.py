"""Numbers of a set of rollouts. Pure.

Invariant: an unscored completion counts as unscored, never as 0; a failed one as failed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from eval_protocol_rft.batch.stats.metrics import MetricMeans
from eval_protocol_rft.pass_at_k import pass_at_k
from eval_protocol_rft.report.rows import StoredRow

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSummary:
    """Totals over rows. `None`: nothing to compute it from."""

    rows: int
    """Of the data set: those with the same `row_id` are one, as runs of it are, and what was
    sampled behind several prompts."""
    failed_rows: int
    completions: int
    failed_completions: int
    unscored: int
    truncated: int
    tokens: int
    """Sampled tokens."""
    mean_reward: float | None
    """Over scored completions."""
    metrics: dict[str, float]
    """Mean of each of the evaluator's own metrics."""
    pass_at_k: dict[int, float]
    """k -> mean over the rows of the data set that have k scored completions; a pass is a reward
    at or above the threshold."""
    tokens_per_second: float | None
    """From the first completion asked for to the last one back."""
    models: tuple[str, ...]
    temperatures: tuple[float, ...]


def summarize_rows(rows: Iterable[StoredRow], *, pass_threshold: float = 1.0) -> RolloutSummary:
    """Sum up rows; those without a record count as failed."""
    rows = list(rows)
    records = [row.record for row in rows if row.record is not None]
    groups: dict[str | int, list[float]] = {}
    for i, row in enumerate(rows):
        group = groups.setdefault(row.row_id or i, [])
        if row.record is not None:
            group += [reward for reward in row.record.rewards or [] if reward is not None]
    scored = list(groups.values())
    rewards = [reward for group in scored for reward in group]
    completions = sum(len(record) for record in records)
    tokens = sum(sum(record.sampled_counts) for record in records)
    metrics = MetricMeans()
    for record in records:
        for result in record.completion_results or []:
            metrics.add(result.metrics)
    return RolloutSummary(
        rows=len(groups),
        failed_rows=len(rows) - len(records),
        completions=completions,
        failed_completions=sum(len(record.failures) for record in records),
        unscored=completions - len(rewards),
        truncated=sum(sum(record.ends_truncated) for record in records),
        tokens=tokens,
        mean_reward=float(np.mean(rewards)) if rewards else None,
        metrics=metrics.means,
        pass_at_k=_pass_at_k(scored, pass_threshold),
        tokens_per_second=_rate(rows, tokens),
        models=tuple(sorted(_known(record.sampling.model for record in records))),
        temperatures=tuple(sorted(_known(record.sampling.temperature for record in records))),
    )


def _known(values: Iterable[T | None]) -> set[T]:
    return {value for value in values if value is not None}


def _pass_at_k(scored: list[list[float]], threshold: float) -> dict[int, float]:
    sizes = [len(group) for group in scored if group]
    if not sizes:
        return {}
    estimates = {}
    for k in sorted({1, max(sizes)}):
        groups = [group for group in scored if len(group) >= k]
        n = np.array([len(group) for group in groups])
        c = np.array([sum(reward >= threshold for reward in group) for group in groups])
        estimates[k] = float(np.mean(pass_at_k(n, c, k)))
    return estimates


def _rate(rows: list[StoredRow], tokens: int) -> float | None:
    spans = [
        (row.record.sampling.began_at, row.record.sampling.began_at + row.seconds)
        for row in rows
        if row.record is not None and row.seconds is not None and row.record.sampling.began_at
    ]
    if not spans:
        return None
    seconds = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return tokens / seconds if seconds > 0 else None
