"""Advantage estimators against hand calculation, brute force, and what theory says of them."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from eval_protocol_rft.training import advantages

RELATIVE = {
    "grpo": advantages.grpo,
    "grpo, population": partial(advantages.grpo, ddof=0, eps=0.0),
    "dr_grpo": advantages.dr_grpo,
    "rloo": advantages.rloo,
    "maxrl": advantages.maxrl,
    "pkpo": partial(advantages.pkpo, k=2),
    "grpo_passk": advantages.grpo_passk,
    "opo": lambda rewards: advantages.opo(rewards, lengths=np.ones(np.shape(rewards))),
}
BATCH = {
    "reinforce_pp": advantages.reinforce_pp,
    "reinforce_pp with baseline": partial(advantages.reinforce_pp, group_baseline=True),
    "gpg": advantages.gpg,
}
EVERY = {**RELATIVE, **BATCH, "reinforce": advantages.reinforce}
CENTERED = ("grpo", "grpo, population", "dr_grpo", "rloo", "maxrl", "opo", "gpg")

rewards_with_gaps = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 6)),
    elements=st.one_of(st.sampled_from([0.0, 0.1, 1.0, np.nan]), st.floats(0, 1e6)),
)


def test_grpo_by_hand():
    # mean 2; unbiased variance (1 + 1 + 4 + 4) / 3; population variance 10 / 4
    rewards = [1.0, 3.0, 0.0, 4.0]
    deviations = np.array([-1.0, 1.0, -2.0, 2.0])
    assert advantages.grpo(rewards, eps=0.0) == pytest.approx(deviations / math.sqrt(10 / 3))
    assert advantages.grpo(rewards, ddof=0, eps=0.0) == pytest.approx(deviations / math.sqrt(2.5))
    assert advantages.grpo(rewards, ddof=0, eps=0.5) == pytest.approx(
        deviations / (math.sqrt(2.5) + 0.5)
    )


def test_grpo_of_one_success_in_four_by_hand():
    # mean 1/4; unbiased deviation 1/2
    expected = [1.5, -0.5, -0.5, -0.5]
    assert advantages.grpo([1, 0, 0, 0], eps=0.0) == pytest.approx(expected)


def test_dr_grpo_rloo_and_maxrl_by_hand():
    rewards = [1.0, 0.0, 0.0, 1.0, 0.5]
    assert advantages.dr_grpo(rewards) == pytest.approx([0.5, -0.5, -0.5, 0.5, 0.0])
    # against the mean of the other four: 1.5/4, 2.5/4, 2.5/4, 1.5/4, 2/4
    assert advantages.rloo(rewards) == pytest.approx([0.625, -0.625, -0.625, 0.625, 0.0])
    assert advantages.maxrl(rewards) == pytest.approx([1.0, -1.0, -1.0, 1.0, 0.0])


def test_reinforce_is_the_reward_less_a_constant():
    assert advantages.reinforce([2.0, None, 2.0], baseline=0.5).tolist() == [1.5, 0.0, 1.5]
    assert advantages.reinforce([3.0]).tolist() == [3.0]


def test_reinforce_pp_by_hand():
    # mean 3, population variance (9 + 1 + 1 + 9) / 4 = 5
    rewards = [[0.0, 2.0], [4.0, 6.0]]
    expected = np.array([[-3.0, -1.0], [1.0, 3.0]]) / math.sqrt(5)
    assert advantages.reinforce_pp(rewards, eps=0.0) == pytest.approx(expected)
    # less the group means 1 and 5: -1, 1, -1, 1; mean 0, variance 1
    assert advantages.reinforce_pp(rewards, group_baseline=True, eps=0.0) == pytest.approx(
        np.array([[-1.0, 1.0], [-1.0, 1.0]])
    )


def test_gdpo_by_hand_keeps_apart_what_a_summed_reward_confuses():
    # Two rewards in {0, 1}; groups of two. Summed, (1,0)-(0,0) and (1,1)-(0,0) look alike to GRPO.
    rewards = [[[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]]
    summed = advantages.grpo(np.sum(rewards, axis=-1), eps=0.0)
    assert summed[0] == pytest.approx(summed[1])
    # Each component that varies gives +-1/sqrt(2); the sums +-s and +-2s have variance 2.5 s^2
    expected = np.array([[1.0, -1.0], [2.0, -2.0]]) / math.sqrt(2.5)
    assert advantages.gdpo(rewards, ddof=1, eps=0.0)[0, 0] < advantages.gdpo(rewards)[1, 0]
    population = advantages.gdpo(rewards, ddof=0, eps=0.0)
    assert population == pytest.approx(expected)


def test_gdpo_weighs_components_and_leaves_out_missing_ones():
    rewards = [[[1.0, 0.0], [0.0, 1.0], [None, None]], [[0.5, None], [0.25, None], [0.0, None]]]
    only_first = advantages.gdpo(rewards, weights=[1.0, 0.0])
    assert only_first[0, 2] == 0.0
    assert only_first[0, 0] > 0 > only_first[0, 1]
    opposed = advantages.gdpo(rewards, weights=[1.0, 1.0])
    assert opposed[0].tolist() == [0.0, 0.0, 0.0]  # the two components cancel
    assert opposed[1, 0] > 0
    with pytest.raises(ValueError, match="2 reward components but 3 weights"):
        advantages.gdpo(rewards, weights=[1, 1, 1])


def brute_force_pkpo(rewards: list[float], k: int) -> list[float]:
    """The paper's definition: over all k-subsets with i, best with i less best without."""
    n = len(rewards)
    gains = [0.0] * n
    for subset in itertools.combinations(range(n), k):
        best = max(rewards[i] for i in subset)
        for i in subset:
            gains[i] += best - max(rewards[j] for j in subset if j != i)
    return [n * gain / math.comb(n, k) for gain in gains]


@given(
    rewards=st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0, -2.0]), min_size=2, max_size=7),
    k=st.integers(2, 7),
    gaps=st.integers(0, 3),
)
def test_pkpo_is_the_mean_gain_over_all_subsets(rewards, k, gaps):
    got = advantages.pkpo([None] * gaps + rewards, k=k)
    expected = brute_force_pkpo(rewards, k) if k <= len(rewards) else [0.0] * len(rewards)
    assert got[gaps:] == pytest.approx(expected, abs=1e-12)
    assert not got[:gaps].any()


def test_pkpo_refuses_k_of_one():
    with pytest.raises(ValueError, match="for k = 1, the mean reward, use rloo"):
        advantages.pkpo([1.0, 0.0], k=1)


# What an estimator estimates. A policy over three answers with probabilities softmax(logits); the
# expected gradient of n completions, over all 3^n outcomes, against the exact gradient.

LOGITS = np.array([0.3, -0.4, 0.9])


def probabilities(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def expected_gradient(estimate, rewards: np.ndarray, n: int) -> np.ndarray:
    """Sum over outcomes of p(outcome) * mean_i A_i * grad log pi(answer_i)."""
    p = probabilities(LOGITS)
    scores = np.eye(3) - p  # grad of log p[a] with respect to the logits
    total = np.zeros(3)
    for outcome in itertools.product(range(3), repeat=n):
        chosen = list(outcome)
        total += p[chosen].prod() * (estimate(rewards[chosen]) @ scores[chosen]) / n
    return total


def exact_gradient(objective, rewards: np.ndarray) -> np.ndarray:
    steps = 1e-6 * np.eye(3)
    return np.array(
        [
            (
                objective(probabilities(LOGITS + step), rewards)
                - objective(probabilities(LOGITS - step), rewards)
            )
            / 2e-6
            for step in steps
        ]
    )


def mean_reward(p: np.ndarray, rewards: np.ndarray) -> float:
    return float(p @ rewards)


def best_of(k: int, p: np.ndarray, rewards: np.ndarray) -> float:
    return sum(
        p[list(chosen)].prod() * rewards[list(chosen)].max()
        for chosen in itertools.product(range(3), repeat=k)
    )


def truncated_log_likelihood(terms: int, p: np.ndarray, rewards: np.ndarray) -> float:
    success = float(p @ rewards)
    return sum((1 - (1 - success) ** k) / k for k in range(1, terms + 1))


@pytest.mark.parametrize(
    "estimate", [advantages.rloo, advantages.reinforce, partial(advantages.remax, baselines=0.7)]
)
def test_rloo_reinforce_and_remax_estimate_the_gradient_of_the_mean_reward(estimate):
    rewards = np.array([0.2, 1.0, -0.5])
    assert expected_gradient(estimate, rewards, 4) == pytest.approx(
        exact_gradient(mean_reward, rewards), abs=1e-7
    )


def test_dr_grpo_is_biased_by_the_factor_that_rloo_mends():
    rewards = np.array([0.2, 1.0, -0.5])
    assert expected_gradient(advantages.dr_grpo, rewards, 4) == pytest.approx(
        exact_gradient(mean_reward, rewards) * 3 / 4, abs=1e-7
    )


@pytest.mark.parametrize("k", [2, 3])
def test_pkpo_estimates_the_gradient_of_the_best_of_k(k):
    rewards = np.array([0.2, 1.0, -0.5])
    assert expected_gradient(partial(advantages.pkpo, k=k), rewards, 4) == pytest.approx(
        exact_gradient(partial(best_of, k), rewards), abs=1e-7
    )


@pytest.mark.parametrize("n", [2, 4])
def test_grpo_passk_estimates_the_gradient_of_the_best_of_all(n):
    rewards = np.array([0.2, 1.0, -0.5])

    def summed(group):
        return n * advantages.grpo_passk(group, by_std=False)

    assert expected_gradient(summed, rewards, n) == pytest.approx(
        exact_gradient(partial(best_of, n), rewards), abs=1e-7
    )


@pytest.mark.parametrize("n", [2, 5])
def test_maxrl_estimates_the_gradient_of_the_truncated_log_likelihood(n):
    rewards = np.array([0.0, 1.0, 0.0])
    assert expected_gradient(advantages.maxrl, rewards, n) == pytest.approx(
        exact_gradient(partial(truncated_log_likelihood, n - 1), rewards), abs=1e-7
    )


# What holds for any rewards.


@pytest.mark.parametrize("name", EVERY)
@given(rewards=rewards_with_gaps)
def test_nothing_is_ever_nan_and_what_is_missing_has_no_advantage(name, rewards):
    result = EVERY[name](rewards)
    assert result.shape == rewards.shape
    assert np.isfinite(result).all()
    assert not result[np.isnan(rewards)].any()


@given(
    rewards=hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)),
        elements=st.sampled_from([0.0, 0.1, 1.0, np.nan]),
    )
)
def test_gdpo_is_never_nan_and_sums_to_zero_over_the_batch(rewards):
    result = advantages.gdpo(rewards)
    assert np.isfinite(result).all()
    assert result.sum() == pytest.approx(0.0, abs=1e-9)
    assert not result[np.isnan(rewards).all(axis=-1)].any()


@pytest.mark.parametrize("name", RELATIVE)
@given(
    reward=st.floats(0, 1e9),
    size=st.integers(1, 9),
    gaps=st.integers(0, 2),
)
def test_equal_rewards_and_groups_of_one_have_exactly_zero_advantage(name, reward, size, gaps):
    assert not EVERY[name]([reward] * size + [None] * gaps).any()


@pytest.mark.parametrize("name", RELATIVE)
@pytest.mark.parametrize(
    "rewards", [[0.1 + 0.2, 0.3, 0.3], [0.1, float(np.float32(0.1))], [0.3 - 0.1 - 0.2, 0.0]]
)
def test_rewards_that_differ_by_rounding_have_exactly_zero_advantage(name, rewards):
    assert not EVERY[name](np.maximum(rewards, 0.0) if name == "maxrl" else rewards).any()
    assert EVERY[name]([0.3, 0.3001]).any()


@pytest.mark.parametrize("name", EVERY)
@given(rewards=rewards_with_gaps)
def test_a_group_with_gaps_is_the_group_without_them(name, rewards):
    groups = [group[~np.isnan(group)] for group in rewards]
    results = EVERY[name](rewards)
    if name in BATCH:
        together = EVERY[name](rewards[~np.isnan(rewards)][None])
        if name == "reinforce_pp":
            assert results[~np.isnan(rewards)] == pytest.approx(together[0], abs=1e-9)
        return
    for group, own, result in zip(groups, rewards, results, strict=True):
        if len(group):
            alone = EVERY[name](group)
            assert result[~np.isnan(own)] == pytest.approx(alone, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", EVERY)
@given(rewards=rewards_with_gaps, data=st.data())
def test_permuting_a_group_permutes_its_advantages(name, rewards, data):
    order = data.draw(st.permutations(range(rewards.shape[1])))
    permuted = EVERY[name](rewards[:, order])
    assert permuted == pytest.approx(EVERY[name](rewards)[:, order], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", CENTERED)
@given(rewards=rewards_with_gaps)
def test_centred_advantages_sum_to_zero_in_each_group(name, rewards):
    result = EVERY[name](rewards)
    scale = np.abs(result).max(axis=-1, initial=1.0)
    assert result.sum(axis=-1) / scale == pytest.approx(np.zeros(len(result)), abs=1e-6)


@pytest.mark.parametrize("name", BATCH)
@given(rewards=rewards_with_gaps)
def test_batch_normalised_advantages_sum_to_zero_over_the_batch(name, rewards):
    result = EVERY[name](rewards)
    assert result.sum() / max(np.abs(result).max(), 1.0) == pytest.approx(0.0, abs=1e-6)


tame = hnp.arrays(np.float64, (2, 4), elements=st.integers(-8, 8).map(lambda i: i / 4))


@pytest.mark.parametrize("name", ["grpo", "grpo, population", "dr_grpo", "rloo", "pkpo", *BATCH])
@given(rewards=tame, shift=st.integers(-64, 64))
def test_a_constant_added_to_all_rewards_changes_nothing(name, rewards, shift):
    assert EVERY[name](rewards + shift) == pytest.approx(EVERY[name](rewards), abs=1e-9)


@pytest.mark.parametrize(
    ("name", "power"),
    [("grpo, population", 0), ("dr_grpo", 1), ("rloo", 1), ("pkpo", 1), ("maxrl", 0)],
)
@given(rewards=tame, scale=st.sampled_from([0.25, 2.0, 16.0]))
def test_scaled_rewards_scale_advantages_or_leave_them(name, power, rewards, scale):
    positive = np.abs(rewards)
    expected = EVERY[name](positive) * scale**power
    assert EVERY[name](positive * scale) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_rewards_that_are_no_numbers_are_refused(name):
    with pytest.raises(ValueError, match=r"rewards\[1\] is inf"):
        EVERY[name]([0.0, math.inf])
    with pytest.raises(ValueError, match=r"rewards\[0, 1\] is 1e\+300"):
        EVERY[name]([[0.0, 1e300]])
    with pytest.raises(ValueError, match="group axis"):
        EVERY[name](1.0)


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="ddof must be 0 or 1, got 2"):
        advantages.grpo([1.0, 0.0], ddof=2)
    with pytest.raises(ValueError, match=r"maxrl needs rewards >= 0.*rewards\[1\] is -1.0"):
        advantages.maxrl([1.0, -1.0])
    with pytest.raises(ValueError, match=r"shape \[..., G, K\], got \(2,\)"):
        advantages.gdpo([1.0, 0.0])
