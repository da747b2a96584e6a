"""What a rollout file holds, in numbers: rewards, pass@k, lengths, failures, data rows.

Invariant: every completion asked for is counted once, as failed, scored or unscored. Of token data
only its length is read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from eval_protocol_rft.batch.dataset import RolloutDataset
from eval_protocol_rft.batch.numbers import Ints, chosen_reward, whole_groups, with_rewards
from eval_protocol_rft.batch.progress import Reading
from eval_protocol_rft.batch.rollouts.format import FormatError, reward_columns
from eval_protocol_rft.batch.stats.collector import StatsCollector
from eval_protocol_rft.batch.stats.distribution import distribution
from eval_protocol_rft.batch.stats.types import PassAtK, RolloutStats
from eval_protocol_rft.pass_at_k import pass_at_k

_COLUMNS = (
    "row_id", "data_idx", "sample_idx", "prompt", "completion_ids", "truncated", "error",
    "error_kind",
)  # fmt: skip
_REWARD_PERCENTS = (5, 25, 50, 75, 95)
_LENGTH_PERCENTS = (50, 90, 99)


def rollout_stats(
    path: str | os.PathLike[str],
    *,
    reward: str | None = None,
    pass_threshold: float = 1.0,
    progress: bool | None = None,
) -> RolloutStats:
    """Sum up a rollout file, scored or not, or what an unfinished job has put aside.

    Args:
        path: the file.
        reward: name of a further reward; None is the main one.
        pass_threshold: the reward from which a completion passes.
        progress: show a bar where it takes long; None: where stderr is a terminal.

    Raises:
        FormatError: no rollout file, an empty or a broken one; no such reward.
        ValueError: the threshold is not finite.
    """
    if not math.isfinite(pass_threshold):
        raise ValueError(f"pass_threshold must be finite, got {pass_threshold}")
    dataset = RolloutDataset(path)
    column = chosen_reward(dataset, reward)
    further = [name for name in reward_columns(column)[2:] if name in dataset.schema.names]
    tables = dataset.tables([*_COLUMNS, column, *further])
    sampling = dataset.metadata.sampling
    with Reading("stats", dataset.rows_about, show=progress) as reading:
        return summarize_tables(
            reading(tables),
            path=str(path),
            finished=dataset.finished,
            model=None if sampling is None else sampling.model,
            reward=column,
            pass_threshold=pass_threshold,
        )


def summarize_tables(
    tables: Iterable[pa.Table],
    *,
    path: str,
    finished: bool,
    model: str | None,
    reward: str,
    pass_threshold: float,
) -> RolloutStats:
    """`rollout_stats` of tables in file order, none of them empty; `reward` is a column here."""
    seen = StatsCollector(reward, pass_threshold)
    for table in whole_groups(with_rewards(tables, reward, where=path), where=path):
        seen.add(table)
    groups = seen.groups
    if groups is None:
        nothing = "it holds no completions" if finished else "no completion is stored yet"
        raise FormatError(f"{path}: {nothing}")
    failed, scored = int(groups.failed.sum()), int(groups.scored.sum())
    completions, truncated = int(groups.completions.sum()), int(groups.truncated.sum())
    sampled = completions - failed
    rewards, times = np.unique(seen.rewards, return_counts=True)
    lengths = np.flatnonzero(seen.lengths)
    return RolloutStats(
        path=path,
        finished=finished,
        model=model,
        reward=reward,
        pass_threshold=pass_threshold,
        completions=completions,
        failed=failed,
        scored=scored,
        unscored=sampled - scored,
        truncated=truncated,
        truncation_rate=truncated / sampled if sampled else None,
        tokens=int(groups.tokens.sum()),
        rewards=distribution(rewards, times, percents=_REWARD_PERCENTS),
        lengths=distribution(lengths, seen.lengths[lengths], percents=_LENGTH_PERCENTS),
        metrics=seen.metrics,
        pass_at_k=pass_at_every_k(groups.scored, groups.passed),
        failures=seen.failures,
        unscored_reasons=seen.unscored_reasons,
        groups=len(groups.scored),
        groups_all_passed=int(np.sum((groups.passed == groups.scored) & (groups.scored > 0))),
        groups_none_passed=int(np.sum((groups.passed == 0) & (groups.scored > 0))),
        groups_mixed=int(np.sum((groups.passed > 0) & (groups.passed < groups.scored))),
        groups_unscored=int(np.sum(groups.scored == 0)),
        per_group=groups.hardest_first(),
    )


def pass_at_every_k(scored: Ints, passed: Ints) -> list[PassAtK]:
    """pass@k for k = 1, 2, ... up to the most scored completions of a data row.

    Args:
        scored: [P] scored completions.
        passed: [P] those that passed.
    """
    pairs, times = np.unique(np.stack([scored, passed], axis=1), axis=0, return_counts=True)
    most = int(scored.max(initial=0))
    total, groups = np.zeros(most), np.zeros(most, np.int64)
    for (n, c), count in zip(pairs.tolist(), times.tolist(), strict=True):
        total[:n] += count * pass_at_k(n, c, np.arange(1, n + 1))
        groups[:n] += count
    return [
        PassAtK(k, value, size)
        for k, (value, size) in enumerate(
            zip((total / groups).tolist(), groups.tolist(), strict=True), start=1
        )
    ]
