"""What a batch was made from, in numbers.

Invariant: rewards, truncation and pass@k describe everything that was sampled and scored, before
filters and shaping, so that they do not flatter; token counts describe what is trained on. An
episode of several turns counts once, however many datums it gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft._statistics import (
    count_outcomes,
    count_passes,
    mean_pass_at_k,
    powers_of_two,
)
from eval_protocol_rft.training._datums import target_count
from eval_protocol_rft.training._trajectory import PromptGroup, Trajectory


@dataclass(frozen=True, slots=True)
class GroupStats:
    """What is kept of a group for the statistics, whatever becomes of it."""

    rewards: NDArray[np.float64]
    """[scored] before shaping."""
    sampled: int
    """Completions that were sampled, scored or not."""
    truncated: int
    versions: Counter[str | None]

    @classmethod
    def of(cls, group: PromptGroup) -> GroupStats:
        rewards = group.rewards
        return cls(
            rewards=rewards[~np.isnan(rewards)],
            sampled=len(group),
            truncated=sum(t.truncated for t in group.trajectories),
            versions=Counter(t.policy_version for t in group.trajectories),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStats:
    """Statistics of one batch. Means over nothing are None, never 0."""

    groups: int
    """Prompt groups read, dropped ones included."""
    groups_trained: int
    completions: int
    """Completions sampled, unscored ones included."""
    scored: int
    datums: int
    """One per completion that trains; of an episode, one per segment."""
    group_sizes: Mapping[int, int]
    """Completions of a group that train -> groups with that many, of those with any."""
    reward_mean: float | None
    reward_std: float | None
    """Population deviation (ddof 0) over completions."""
    reward_min: float | None
    reward_max: float | None
    truncated: int
    """Completions sampled that were cut off at max_tokens."""
    sampled_tokens: int
    """Targets trained on, those with a weight."""
    context_tokens: int
    """The datums' other targets: prompts and what else was not sampled."""
    pass_at_k: Mapping[int, float]
    """k -> mean over the groups with at least k scored completions, for k = 1, 2, 4, ..."""
    all_correct: int
    """Groups whose scored completions are all correct."""
    none_correct: int
    """Groups with scored completions, none of them correct."""
    policy_versions: Mapping[str | None, int]
    """Version -> completions it sampled; None where unknown."""


def batch_stats(
    groups: Sequence[GroupStats],
    trained: Sequence[Trajectory],
    trained_of: Sequence[int],
    *,
    pass_threshold: float,
) -> BatchStats:
    """Put the statistics together.

    Args:
        groups: all groups read.
        trained: [S] the sequences trained on.
        trained_of: [S] number of the group of each.
        pass_threshold: the reward from which a completion counts as correct.
    """
    sampled_tokens = sum(trajectory.total_sampled for trajectory in trained)
    targets = sum(map(target_count, trained))
    rewards = np.concatenate([g.rewards for g in groups]) if groups else np.empty(0)
    scored, correct = count_passes([g.rewards for g in groups], pass_threshold)
    outcomes = count_outcomes(scored, correct)
    ks = powers_of_two(scored.max(initial=0))
    trained_of_group = Counter(trained_of)
    return BatchStats(
        groups=len(groups),
        groups_trained=len(trained_of_group),
        completions=sum(g.sampled for g in groups),
        scored=len(rewards),
        datums=sum(len(trajectory.segments) for trajectory in trained),
        group_sizes=dict(sorted(Counter(trained_of_group.values()).items())),
        reward_mean=float(rewards.mean()) if len(rewards) else None,
        reward_std=float(rewards.std()) if len(rewards) else None,
        reward_min=float(rewards.min()) if len(rewards) else None,
        reward_max=float(rewards.max()) if len(rewards) else None,
        truncated=sum(g.truncated for g in groups),
        sampled_tokens=sampled_tokens,
        context_tokens=targets - sampled_tokens,
        pass_at_k={p.k: p.value for p in mean_pass_at_k(scored, correct, ks)},
        all_correct=outcomes["all"],
        none_correct=outcomes["none"],
        policy_versions=dict(sum((g.versions for g in groups), Counter[str | None]())),
    )
