"""Advantage estimators: rewards in, advantages out, one function per paper.

Invariant: no result is NaN, and no reward is made up. Rewards are arrays [..., G]: the last axis
is a prompt group of G completions, the axes before it are groups of one batch. A missing reward
(None or NaN) is a completion without a score, or padding: it takes no part in any mean or
deviation, and its advantage is exactly 0.0, so that it never trains. An infinite reward is an
error. Where all rewards of a group are equal, a group-relative advantage is exactly 0.0, never
float noise divided by epsilon; so it is in a group of one, which has nothing to compare with.

All work in float64. The scale is that of the policy gradient written as a mean over a group,
(1/G) sum_i A_i grad log pi(y_i).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from eval_protocol_rft import _statistics as stats
from eval_protocol_rft._statistics import Array


def grpo(rewards: ArrayLike, *, ddof: int = 1, eps: float = 1e-6) -> Array:
    """(r_i - mean) / (std + eps) within each group.

    Shao et al. 2024, "DeepSeekMath" (arXiv:2402.03300), section 4.1.2, the outcome-supervision
    advantage of eq. 3. The paper leaves the standard deviation open: `ddof=1` (unbiased) is what
    TRL, verl and the Fireworks cookbook use, `ddof=0` is the population's. `eps` is 1e-4 in TRL,
    1e-6 in verl, 1e-8 in the cookbook.

    Args:
        rewards: [..., G], None or NaN where missing.
        ddof: 0 or 1, subtracted from the number of scored completions.
        eps: added to the deviation; 0 is safe, as equal rewards never get that far.

    Returns:
        [..., G] float64.
    """
    values = stats.read_rewards(rewards)
    centered = stats.center(values)
    return stats.divide(centered, stats.deviation(centered, values, ddof=ddof) + eps)


def dr_grpo(rewards: ArrayLike) -> Array:
    """r_i - mean within each group: GRPO without the division.

    Liu et al. 2025, "Understanding R1-Zero-Like Training" (arXiv:2503.20783), section 3.2. The
    other half of that method is a constant length normalisation of the loss.

    Args:
        rewards: [..., G], None or NaN where missing.

    Returns:
        [..., G] float64; sums to zero in each group.
    """
    return stats.center(stats.read_rewards(rewards))


def rloo(rewards: ArrayLike) -> Array:
    """r_i minus the mean of the group's other rewards.

    Ahmadian et al. 2024, "Back to Basics" (arXiv:2402.14740), the RLOO estimator of section 2;
    after Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!". With n scored
    completions this is n / (n - 1) times `dr_grpo`, and unbiased where that one is not.

    Args:
        rewards: [..., G], None or NaN where missing.

    Returns:
        [..., G] float64; sums to zero in each group.
    """
    values = stats.read_rewards(rewards)
    n = stats.count(values)
    return stats.divide(stats.center(values) * n, n - 1)


def reinforce(rewards: ArrayLike, *, baseline: float = 0.0) -> Array:
    """r_i - baseline, with a constant baseline.

    Williams 1992, "Simple statistical gradient-following algorithms for connectionist
    reinforcement learning", eq. 4. Not relative to the group: groups of one and groups of equal
    rewards train.

    Args:
        rewards: [..., G], None or NaN where missing.
        baseline: what an average completion is worth.

    Returns:
        [..., G] float64.
    """
    values = stats.read_rewards(rewards)
    return stats.zero_missing(values - baseline)


def reinforce_pp(
    rewards: ArrayLike, *, group_baseline: bool = False, ddof: int = 0, eps: float = 1e-8
) -> Array:
    """Normalised over the whole batch: (r_i - mean_batch) / (std_batch + eps).

    Hu et al. 2025, "REINFORCE++" (arXiv:2501.03262), global advantage normalisation, with the KL
    term left to the loss. With `group_baseline`, the paper's variant with baseline: the group's
    mean is subtracted first. Statistics are over completions, not weighted by their length.

    Args:
        rewards: [..., G], None or NaN where missing; all of it is one batch.
        group_baseline: subtract each group's mean first; then groups of one and groups of equal
            rewards have advantage 0.0 before normalisation.
        ddof: 0 or 1, subtracted from the number of scored completions in the batch.
        eps: added to the deviation.

    Returns:
        [..., G] float64; sums to zero over the batch.
    """
    values = stats.read_rewards(rewards)
    if group_baseline:
        values = np.where(np.isnan(values), np.nan, stats.center(values))
    return _normalize_batch(values, ddof=ddof, eps=eps)


def maxrl(rewards: ArrayLike) -> Array:
    """(r_i - mean) / mean within each group; 0.0 where the mean is 0.

    Tajwar et al. 2026, "Maximum Likelihood Reinforcement Learning" (arXiv:2602.02710): theorem 2's
    average over successes, with the mean score function as control variate. For rewards in {0, 1},
    n completions and no update where all fail, it is an unbiased estimate of the gradient of
    sum_{k=1}^{n-1} pass@k / k, the truncated log-likelihood of success.

    Args:
        rewards: [..., G], not negative, None or NaN where missing.

    Returns:
        [..., G] float64; sums to zero in each group.

    Raises:
        ValueError: a reward is negative.
    """
    values = stats.read_rewards(rewards)
    if (values < 0).any():
        place = [int(i) for i in np.argwhere(values < 0)[0]]
        raise ValueError(
            f"maxrl needs rewards >= 0, as it divides by their mean: rewards{place} is "
            f"{values[tuple(place)]}"
        )
    return stats.divide(stats.center(values), stats.mean(values))


def gdpo(
    rewards: ArrayLike, *, weights: Sequence[float] | None = None, ddof: int = 1, eps: float = 1e-6
) -> Array:
    """Several rewards: each normalised within its group, summed, then normalised over the batch.

    Liu et al. 2026, "GDPO" (arXiv:2601.05242), section 3: the decoupled group normalisation of
    each reward, their weighted sum, and its batch-wise normalisation. Unlike GRPO on the summed
    reward, it keeps different mixes of rewards apart.

    Args:
        rewards: [..., G, K] for K reward components, None or NaN where missing. A missing
            component adds nothing to its completion; a completion without any is missing.
        weights: [K] weight of each normalised component; default all 1.
        ddof: 0 or 1, for both deviations.
        eps: added to both deviations.

    Returns:
        [..., G] float64; sums to zero over the batch.
    """
    values = stats.read_rewards(rewards)
    if values.ndim < 2:
        raise ValueError(f"gdpo needs rewards of shape [..., G, K], got {values.shape}")
    factors = np.ones(values.shape[-1]) if weights is None else np.asarray(weights, np.float64)
    if factors.shape != values.shape[-1:]:
        raise ValueError(f"{values.shape[-1]} reward components but {factors.size} weights")
    by_group = np.moveaxis(values, -1, 0)
    normalized = np.stack([grpo(component, ddof=ddof, eps=eps) for component in by_group], axis=-1)
    summed = np.where(np.isnan(values).all(axis=-1), np.nan, normalized @ factors)
    return _normalize_batch(summed, ddof=ddof, eps=eps)


def pkpo(rewards: ArrayLike, *, k: int) -> Array:
    """How much each completion raises the best of k: the gradient of max@k (pass@k for 0/1).

    Walder and Karkhanis 2025, "Pass@K Policy Optimization" (arXiv:2505.15201), eq. 33: the mean,
    over all k-subsets of the group, of the subset's best reward minus its best without the
    completion. Times n here, to be on this module's scale. With rewards sorted upwards,

        A_(r) = n / C(n, k) * sum_{j < r} C(j, k-2) * (g_(r) - g_(j)),    ranks from 0,

    as a completion counts only where it is the best, against the best of the others. Never
    negative; unbiased for n >= k.

    Args:
        rewards: [..., G], None or NaN where missing.
        k: size of the set whose best counts, at least 2 (for k = 1 use `rloo`).

    Returns:
        [..., G] float64. 0.0 throughout a group with fewer than k scored completions, which says
        nothing about the best of k.

    Raises:
        ValueError: k is below 2.
    """
    if k < 2:
        raise ValueError(f"pkpo needs k >= 2, got {k}: for k = 1, the mean reward, use rloo")
    values = stats.read_rewards(rewards)
    worst = stats.low(values)
    same = stats.equal(worst, stats.high(values))
    above_worst = np.where(same & ~np.isnan(values), 0.0, values - worst)
    order = np.argsort(above_worst, axis=-1)  # NaN last
    ranked = np.take_along_axis(above_worst, order, axis=-1)
    n = stats.count(values)
    share = _subset_shares(n, values.shape[-1], k)
    below = np.cumsum(share, axis=-1) - share
    beaten = np.nan_to_num(ranked) * share
    marginal = ranked * below - (np.cumsum(beaten, axis=-1) - beaten)
    result = np.empty_like(values)
    np.put_along_axis(result, order, np.maximum(marginal, 0.0) * n, axis=-1)
    return stats.zero_missing(result)


def _subset_shares(n: Array, size: int, k: int) -> Array:
    """[..., size] C(j, k-2) / C(n, k) for ranks j, 0 where n < k; as products of ratios."""
    ranks = np.arange(size, dtype=np.float64)
    safe = np.maximum(n, k)
    share = np.broadcast_to(k * (k - 1) / (safe * (safe - 1)), (*n.shape[:-1], size))
    for i in range(k - 2):
        share = share * np.maximum(ranks - i, 0) / (safe - 2 - i)
    return np.where(n < k, 0.0, share)


def _normalize_batch(values: Array, *, ddof: int, eps: float) -> Array:
    centered = stats.center(values, axis=None)
    return stats.divide(centered, stats.deviation(centered, values, axis=None, ddof=ddof) + eps)
