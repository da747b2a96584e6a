"""What is dropped or shaped before training, and why: pure, one group at a time.

Invariant: every completion that was asked for either stays or is counted once, under the first
reason that applied to it. Nothing is dropped without a count. An episode of several turns is one
completion: it stays or goes with all its segments.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval_protocol_rft import _statistics as stats
from eval_protocol_rft._options import Flag, check_options
from eval_protocol_rft.training._types import PromptGroup, TrainingDataError, Trajectory

DROP_REASONS = {
    "failed": "the sampler got no completion",
    "failed_row": "the whole rollout failed; counts rows, not completions",
    "cancelled": "asked for beyond n (over_sample), and given up once n were there",
    "baseline": "greedy, where the estimator compares with the greedy completion (remax)",
    "no_baseline": "no greedy completion of its prompt has a reward, where the estimator needs one",
    "unscored": "the evaluator gave no valid score",
    "stale": "sampled by weights more than max_staleness versions old",
    "unknown_version": "max_staleness is set and its policy version is not in policy_versions",
    "mixed_versions": 'sampled by several policy versions, with mixed_versions="drop"',
    "truncated": 'cut off at max_tokens, with truncated="drop"',
    "too_long": "longer than a length limit",
    "small_group": "fewer than min_group_size completions of its group are left",
    "zero_variance": "all rewards of its group are equal, up to rounding: no gradient",
    "masked": 'cut off at max_tokens, with truncated="mask": counts in its group, trains nothing',
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftOverlong:
    """DAPO's soft overlong punishment, added to the reward.

    Yu et al. 2025 (arXiv:2503.14476), eq. 13: 0 up to `max_tokens - cache_tokens` sampled tokens,
    then falling in a line to -1 at `max_tokens`, and -1 beyond.
    """

    max_tokens: int
    """L_max: where the penalty is -1."""
    cache_tokens: int
    """L_cache: over how many tokens it gets there."""

    def __post_init__(self) -> None:
        if not 0 < self.cache_tokens <= self.max_tokens:
            raise TrainingDataError(
                f"cache_tokens must lie between 1 and max_tokens={self.max_tokens}, got "
                f"{self.cache_tokens}"
            )

    def penalty(self, lengths: ArrayLike) -> NDArray[np.float64]:
        """[...] penalties, from -1 to 0, for [...] numbers of sampled tokens."""
        over = np.asarray(lengths, np.float64) - (self.max_tokens - self.cache_tokens)
        return np.asarray(-np.clip(over / self.cache_tokens, 0.0, 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What trains. Applied in the order of `DROP_REASONS`; the penalty on length comes last. DAPO
    filters on what the answers earned (eq. 11), and shapes what is left (eq. 13): the penalty makes
    no signal where all answers earned the same."""

    truncated: Annotated[Literal["keep", "mask", "drop"], Flag()] = "keep"
    """Completions cut off at max_tokens. mask: they count in their group and train nothing (DAPO's
    overlong filtering). drop: as if they had not been sampled."""
    soft_overlong: SoftOverlong | None = None
    max_sequence_tokens: int | None = None
    """Longest prompt with completion: what the trainer's context holds. Of an episode, the longest
    segment."""
    max_completion_tokens: int | None = None
    """Most sampled tokens. Of an episode, in all its turns."""
    min_group_size: int | None = None
    """Fewest completions of a group. Default: 2 where the estimator compares within the group,
    else 1."""
    zero_variance: Literal["keep", "drop"] | None = None
    """Groups whose rewards are all equal, before any shaping. Default: drop where the estimator
    compares within the group (it would make them 0.0), else keep."""
    max_staleness: int | None = None
    """Most policy versions that a completion may be behind, by the oldest that sampled a part of
    it; needs `policy_versions`."""
    policy_versions: Sequence[str] = ()
    """Versions from old to new; the last is the one that will be trained."""
    mixed_versions: Annotated[Literal["keep", "drop"], Flag()] = "keep"
    """Completions in whose midst the server swapped its weights.

    Each of their logprobs is that of the weights that drew the token, so importance ratios are
    right; there is no one policy that the completion as a whole is a sample of."""

    def __post_init__(self) -> None:
        check_options(self, TrainingDataError)
        if self.max_staleness is not None and not self.policy_versions:
            raise TrainingDataError(
                "max_staleness needs policy_versions: the versions from old to new, so that their "
                "distance is known"
            )


def filter_group(
    group: PromptGroup,
    filters: Filters,
    *,
    relative: bool,
    components: tuple[str, ...] = (),
    baseline: bool = False,
) -> tuple[PromptGroup | None, Counter[str]]:
    """Apply `filters` to one group.

    Args:
        group: what was sampled.
        filters: what to keep.
        relative: the estimator compares completions within the group; decides the defaults.
        components: the scores that the estimator will read; default the reward alone.
        baseline: the estimator compares with the greedy completions, which are taken out.

    Returns:
        What is left, all of it scored, with shaped rewards, None where nothing trains; and the
        completions dropped, by reason.
    """
    reasons = [_reason(trajectory, filters) for trajectory in group.trajectories]
    if baseline:
        rewards = [
            t.reward + _penalty(t, filters)
            for t in group.trajectories
            if t.greedy and t.reward is not None
        ]
        if rewards:
            group = dataclasses.replace(group, baseline=float(np.mean(rewards)))
        reasons = [
            "baseline" if t.greedy else reason if reason or rewards else "no_baseline"
            for t, reason in zip(group.trajectories, reasons, strict=True)
        ]
    left = tuple(t for t, reason in zip(group.trajectories, reasons, strict=True) if not reason)
    dropped = Counter(reason for reason in reasons if reason)
    dropped.update(
        failed=len(group.failures),
        failed_row=len(group.failed_rows),
        cancelled=group.cancelled,
    )
    kept = dataclasses.replace(group, trajectories=left, failures=(), cancelled=0, failed_rows=())
    group_reason = _group_reason(kept, filters, relative, components)
    if group_reason is not None:
        dropped[group_reason] += len(kept)
        return None, +dropped
    if filters.soft_overlong is not None:
        left = tuple(
            msgspec.structs.replace(t, reward=(t.reward or 0.0) + _penalty(t, filters))
            for t in left
        )
    if filters.truncated == "mask":
        left = tuple(msgspec.structs.replace(t, trains=not t.truncated) for t in left)
        dropped["masked"] += sum(not trajectory.trains for trajectory in left)
    trains = any(trajectory.trains for trajectory in left)
    return (dataclasses.replace(kept, trajectories=left) if trains else None), +dropped


def _penalty(trajectory: Trajectory, filters: Filters) -> float:
    """What its length adds to the reward."""
    shaping = filters.soft_overlong
    return 0.0 if shaping is None else float(shaping.penalty(trajectory.total_sampled))


def _reason(trajectory: Trajectory, filters: Filters) -> str | None:
    """Why this completion is left out, or None."""
    if trajectory.reward is None:
        return "unscored"
    if filters.max_staleness is not None:
        versions, first = filters.policy_versions, trajectory.first_policy_version
        sampled_by = {trajectory.policy_version} | ({first} if first is not None else set())
        if not sampled_by <= set(versions):
            return "unknown_version"
        oldest = min(i for i, version in enumerate(versions) if version in sampled_by)
        if len(versions) - 1 - oldest > filters.max_staleness:
            return "stale"
    if filters.mixed_versions == "drop" and trajectory.first_policy_version is not None:
        return "mixed_versions"
    if filters.truncated == "drop" and trajectory.truncated:
        return "truncated"
    longest, most = filters.max_sequence_tokens, filters.max_completion_tokens
    if longest is not None and max(map(len, trajectory.segments)) > longest:
        return "too_long"
    if most is not None and trajectory.total_sampled > most:
        return "too_long"
    return None


def _group_reason(
    group: PromptGroup,
    filters: Filters,
    relative: bool,
    components: tuple[str, ...],
) -> str | None:
    """Why all that is left of this group is left out, or None."""
    smallest = (2 if relative else 1) if filters.min_group_size is None else filters.min_group_size
    if len(group) < max(smallest, 1):
        return "small_group"
    default = "drop" if relative else "keep"
    if (filters.zero_variance or default) == "drop":
        scores = (group.components(components) if components else group.rewards[:, None]).T
        # One NaN among equal scores is a difference, as it will not train like the others.
        missing = np.isnan(scores)
        same = stats.equal(stats.low(scores), stats.high(scores))[:, 0]
        if np.all((same & ~missing.any(axis=1)) | missing.all(axis=1)):
            return "zero_variance"
    return None
