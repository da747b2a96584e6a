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
from typing import Literal

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


def opo(rewards: ArrayLike, *, lengths: ArrayLike) -> Array:
    """r_i minus the group's mean reward weighted by length, sum(l r) / sum(l).

    Hao et al. 2025, "On-Policy RL with Optimal Reward Baseline" (arXiv:2505.23585): the baseline of
    least variance where the squared norm of a completion's gradient grows with its length. With
    equal lengths it is `dr_grpo`. As in verl (`opo`), but for groups of one, which have 0.0 here.

    Args:
        rewards: [..., G], None or NaN where missing.
        lengths: [..., G] sampled tokens of each, above 0; not read where the reward is missing.

    Returns:
        [..., G] float64; sums to zero in each group when weighted by length.

    Raises:
        ValueError: lengths of another shape, or one that is not above 0; the message names it.
    """
    values = stats.read_rewards(rewards)
    tokens = np.asarray(lengths, dtype=np.float64)
    if tokens.shape != values.shape:
        raise ValueError(f"opo needs a length per reward: {tokens.shape} for {values.shape}")
    tokens = np.where(np.isnan(values), 0.0, tokens)
    wrong = ~np.isnan(values) & ~((tokens > 0) & np.isfinite(tokens))
    if wrong.any():
        place = [int(i) for i in np.argwhere(wrong)[0]]
        raise ValueError(
            f"lengths are numbers of sampled tokens, above 0: lengths{place} is "
            f"{tokens[tuple(place)]}"
        )
    centered = stats.center(values)
    total = tokens.sum(axis=-1, keepdims=True)
    # Of centred rewards, so that equal ones leave exactly nothing.
    shift = stats.divide((tokens * centered).sum(axis=-1, keepdims=True), total)
    return np.where(np.isnan(values), 0.0, centered - shift)


def remax(rewards: ArrayLike, *, baselines: ArrayLike) -> Array:
    """r_i minus the reward of the prompt's greedy completion.

    Li et al. 2023, "ReMax" (arXiv:2310.10505), algorithm 1; as in verl (`remax`). Not relative to
    the group: groups of one and groups of equal rewards train. The greedy completion itself is no
    sample of the policy and is not among the rewards.

    Args:
        rewards: [..., G], None or NaN where missing.
        baselines: [...] the greedy completion's reward, one per group.

    Returns:
        [..., G] float64.

    Raises:
        ValueError: baselines of another shape, or none where a completion has a reward.
    """
    values = stats.read_rewards(rewards)
    greedy = np.asarray(baselines, dtype=np.float64)
    if greedy.shape != values.shape[:-1]:
        raise ValueError(f"remax needs a baseline per group: {greedy.shape} for {values.shape}")
    missing = ~np.isnan(values).all(axis=-1) & ~np.isfinite(greedy)
    if missing.any():
        place = [int(i) for i in np.argwhere(missing)[0]]
        raise ValueError(f"baselines{place} is {greedy[tuple(place)]}: no reward to compare with")
    same = stats.equal(np.minimum(values, greedy[..., None]), np.maximum(values, greedy[..., None]))
    return np.where(same, 0.0, stats.zero_missing(values - greedy[..., None]))


def gpg(
    rewards: ArrayLike, *, by_std: bool = False, valid: Literal["groups", "rewards"] = "groups"
) -> Array:
    """alpha (r_i - mean), with alpha = all completions / those that have a gradient.

    Chu et al. 2025, "GPG" (arXiv:2504.02546): a group whose rewards are all equal adds nothing to
    the sum and counts in the mean over the batch, and alpha makes up for it. Where a filter drops
    such groups, as is the default, they do not count either and alpha is 1.

    Args:
        rewards: [..., G], None or NaN where missing; all of it is one batch.
        by_std: divide by the group's deviation too (F_norm of the paper; 1 by default).
        valid: what counts as having a gradient: "groups", completions of groups whose rewards
            differ; "rewards", completions with a reward other than 0, which is what verl counts.

    Returns:
        [..., G] float64; sums to zero in each group.
    """
    values = stats.read_rewards(rewards)
    centered = stats.center(values)
    there = ~np.isnan(values)
    differ = ~stats.equal(stats.low(values), stats.high(values))
    counted = there & (differ if valid == "groups" else values != 0)
    if by_std:
        centered = stats.divide(centered, stats.deviation(centered, values, ddof=1))
    return np.asarray(centered * (there.sum() / max(int(counted.sum()), 1)))


def grpo_passk(
    rewards: ArrayLike, *, by_std: bool = True, ddof: int = 1, eps: float = 1e-6
) -> Array:
    """The best of the group gets its lead over the second best, (r_1 - r_2) / (std + eps); all
    others get 0.0, and so does a best that is not alone.

    Tang et al. 2025, "Optimizing Language Models for Inference Time Objectives using Reinforcement
    Learning" (arXiv:2503.19595): the leave-one-out gradient of the best of all G completions, which
    is `pkpo` with k = G but for a factor of 1/G; as in verl (`grpo_passk`), with its division.

    Args:
        rewards: [..., G], None or NaN where missing.
        by_std: divide by the group's deviation.
        ddof: 0 or 1, subtracted from the number of scored completions.
        eps: added to the deviation.

    Returns:
        [..., G] float64, never negative. 0.0 throughout a group of one.
    """
    values = stats.read_rewards(rewards)
    best = stats.high(values)
    is_best = stats.equal(values, best)
    second = stats.high(np.where(is_best, np.nan, values))
    alone = (is_best.sum(axis=-1, keepdims=True) == 1) & np.isfinite(second)
    lead = np.where(is_best & alone, best - np.where(alone, second, 0.0), 0.0)
    if by_std:
        lead = stats.divide(lead, stats.deviation(stats.center(values), values, ddof=ddof) + eps)
    return stats.zero_missing(lead)


def passk(rewards: ArrayLike, *, k: int, eps: float = 1e-6) -> Array:
    """The mean, over all k-subsets with the completion, of the subset's normalised pass@k.

    Chen et al. 2025, "Pass@k Training" (arXiv:2508.10751), the analytical advantages: with n
    completions, c of them correct, and p = 1 - C(n-c, k) / C(n, k),

        right: (1 - p) / s,  wrong: (1 - p - C(n-c-1, k-1) / C(n-1, k-1)) / s,
        s = sqrt(p (1 - p)).

    For k = 1 it is `grpo` with ddof 0. Where c > n - k every subset holds a correct one, and all
    advantages are 0.0. `eps` is that of the authors' code.

    Args:
        rewards: [..., G] 0 or 1, None or NaN where missing.
        k: size of the subsets, at least 1.
        eps: added to s.

    Returns:
        [..., G] float64; sums to zero in each group. 0.0 throughout a group with fewer than k
        scored completions.

    Raises:
        ValueError: k is below 1, or a reward is neither 0 nor 1; the message names it.
    """
    if k < 1:
        raise ValueError(f"passk needs k >= 1, got {k}")
    values = stats.read_rewards(rewards)
    wrong = ~np.isnan(values) & (values != 0) & (values != 1)
    if wrong.any():
        place = [int(i) for i in np.argwhere(wrong)[0]]
        raise ValueError(
            f"passk needs rewards of 0 or 1: rewards{place} is {values[tuple(place)]}; pkpo takes "
            "any"
        )
    scored = np.sum(~np.isnan(values), axis=-1, keepdims=True)
    correct = np.sum(values == 1, axis=-1, keepdims=True)
    signal = (scored >= k) & (correct > 0) & (correct < scored)
    n, c = np.where(signal, scored, k + 1), np.where(signal, correct, 1)
    share = stats.pass_at_k(n, c, k)
    others = 1.0 if k == 1 else 1.0 - stats.pass_at_k(n - 1, c, k - 1)
    spread = np.sqrt(share * (1.0 - share)) + eps
    right, miss = (1.0 - share) / spread, (1.0 - share - others) / spread
    return np.where(signal & ~np.isnan(values), np.where(values == 1, right, miss), 0.0)


def _normalize_batch(values: Array, *, ddof: int, eps: float) -> Array:
    centered = stats.center(values, axis=None)
    return stats.divide(centered, stats.deviation(centered, values, axis=None, ddof=ddof) + eps)
