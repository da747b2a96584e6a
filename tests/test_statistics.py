"""Numbers of many completions, against brute force."""

import math
import statistics
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft._statistics import (
    GROUP_NUMBERS,
    count_outcomes,
    count_passes,
    group_numbers,
    mean_pass_at_k,
    pass_at_k,
    powers_of_two,
)


def share_of_draws_with_a_correct_one(n: int, c: int, k: int) -> float:
    correct = [True] * c + [False] * (n - c)
    draws = list(combinations(correct, k))
    return sum(any(draw) for draw in draws) / len(draws)


@st.composite
def problems(draw):
    n = draw(st.integers(1, 9))
    return n, draw(st.integers(0, n)), draw(st.integers(1, n))


@given(problems())
def test_it_is_the_share_of_all_draws_that_hold_a_correct_completion(problem):
    assert pass_at_k(*problem) == pytest.approx(share_of_draws_with_a_correct_one(*problem))


@given(st.lists(problems(), min_size=1, max_size=5))
def test_arrays_give_each_problem_its_own_estimate(many):
    n, c, k = np.array(many).T
    expected = [share_of_draws_with_a_correct_one(*problem) for problem in many]
    np.testing.assert_allclose(pass_at_k(n, c, k), expected, atol=1e-12)


def test_shapes_broadcast():
    assert pass_at_k(8, np.arange(9)[:, None], [1, 2, 4, 8]).shape == (9, 4)


def test_pass_at_1_is_the_share_of_correct_completions_and_pass_at_n_whether_there_is_one():
    c = np.arange(9)
    np.testing.assert_allclose(pass_at_k(8, c, 1), c / 8)
    assert pass_at_k(8, c, 8).tolist() == [0.0] + [1.0] * 8


def test_scalars_give_a_plain_float():
    assert type(pass_at_k(4, 1, 2)) is float


def test_large_counts_neither_overflow_nor_lose_digits():
    # 1 - C(n-1, k) / C(n, k) = k / n exactly, with binomials far beyond a float's range.
    assert pass_at_k(200_000, 1, 1_000) == pytest.approx(1_000 / 200_000, rel=1e-9)


def test_no_problems_give_no_estimates():
    assert pass_at_k([], [], 1).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 1, 5), "k must lie between 1 and num_completions: num_completions=4, num_correct=1"),
        ((4, 1, 0), "k must lie between 1"),
        ((4, 5, 1), "num_correct must lie between 0"),
        ((4, -1, 1), "num_correct must lie between 0"),
        ((0, 0, 1), "k must lie between 1"),
        (([8, 8, 2], 1, 4), r"at \[2\]: num_completions=2"),
        ((4.0, 1, 1), "num_completions must be integers, got float64"),
    ],
)
def test_impossible_counts_are_refused_and_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(*arguments)


REWARDS = st.sampled_from([math.nan, 0.0, 0.1, 0.3, 1.0, -2.0])
"""NaN: not scored."""


def scored_of(group: list[float]) -> list[float]:
    return [reward for reward in group if not math.isnan(reward)]


@given(st.lists(st.lists(REWARDS, max_size=6), max_size=6), st.sampled_from([None, [1], [2, 4, 9]]))
def test_the_mean_over_groups_is_of_those_with_enough_scored_completions(groups, ks):
    scored, passed = count_passes(groups, 1.0)
    most = max((len(scored_of(group)) for group in groups), default=0)
    curve = mean_pass_at_k(scored, passed, ks)
    assert [point.k for point in curve] == [k for k in ks or range(1, most + 1) if k <= most]
    for point in curve:
        shares = [
            statistics.fmean(max(draw) >= 1 for draw in combinations(scored_of(group), point.k))
            for group in groups
            if len(scored_of(group)) >= point.k
        ]
        assert point.groups == len(shares)
        assert point.value == pytest.approx(statistics.fmean(shares), abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 3)), max_size=6))
def test_a_number_of_equal_groups_counts_as_often(many):
    n, c, times = np.array([(max(n, c), c, t) for n, c, t in many], int).reshape(-1, 3).T
    repeated = np.repeat(n, times), np.repeat(c, times)
    assert count_outcomes(n, c, times=times) == count_outcomes(*repeated)
    for one, other in zip(
        mean_pass_at_k(n, c, times=times), mean_pass_at_k(*repeated), strict=True
    ):
        assert (one.k, one.groups) == (other.k, other.groups)
        assert one.value == pytest.approx(other.value, abs=1e-12)


@given(st.lists(st.lists(REWARDS, max_size=6), max_size=6))
def test_a_group_has_all_some_or_none_passed_or_is_unscored(groups):
    kinds = [
        "unscored"
        if not scored_of(group)
        else "all"
        if min(scored_of(group)) >= 1
        else "mixed"
        if max(scored_of(group)) >= 1
        else "none"
        for group in groups
    ]
    assert count_outcomes(*count_passes(groups, 1.0)) == {
        kind: kinds.count(kind) for kind in ("all", "mixed", "none", "unscored")
    }


def test_powers_of_two_end_at_the_most():
    assert [powers_of_two(most) for most in (0, 1, 7, 8)] == [[], [1], [1, 2, 4], [1, 2, 4, 8]]


Completion = st.tuples(REWARDS, st.integers(1, 4), st.booleans())


@given(st.lists(st.lists(st.none() | Completion, min_size=1, max_size=5), max_size=6))
def test_numbers_of_groups_are_those_of_plain_lists(groups):
    """None: a completion that failed."""
    flat = [
        (i, one or (math.nan, 0, False), one is None) for i, g in enumerate(groups) for one in g
    ]
    numbers = group_numbers(
        np.array([i for i, _, _ in flat], int),
        rewards=np.array([reward for _, (reward, _, _), _ in flat], float),
        tokens=np.array([tokens for _, (_, tokens, _), _ in flat], int),
        failed=np.array([failed for *_, failed in flat], bool),
        truncated=np.array([truncated for _, (_, _, truncated), _ in flat], bool),
        pass_threshold=1.0,
    )
    assert tuple(numbers) == GROUP_NUMBERS
    for i, group in enumerate(groups):
        sampled = [one for one in group if one is not None]
        scored = scored_of([reward for reward, _, _ in sampled])
        passed = sum(reward >= 1 for reward in scored)
        nothing = math.nan
        assert [float(numbers[name][i]) for name in GROUP_NUMBERS] == pytest.approx(
            [
                len(group),
                len(group) - len(sampled),
                len(scored),
                passed,
                sum(truncated for *_, truncated in sampled),
                sum(tokens for _, tokens, _ in sampled),
                passed / len(scored) if scored else nothing,
                statistics.fmean(scored) if scored else nothing,
                min(scored, default=nothing),
                max(scored, default=nothing),
            ],
            abs=1e-12,
            nan_ok=True,
        )


def test_means_of_equal_rewards_are_equal_in_whatever_order_and_number_they_came():
    groups = [[0.1, 0.2, 0.3], [0.3, 0.1, 0.2], [0.2, 0.3, 0.1], [0.1], [0.1] * 3]
    flat = np.array([reward for group in groups for reward in group])
    means = group_numbers(
        np.repeat(np.arange(5), [len(group) for group in groups]),
        rewards=flat,
        tokens=np.ones(len(flat), int),
        failed=np.zeros(len(flat), bool),
        truncated=np.zeros(len(flat), bool),
        pass_threshold=1.0,
    )["mean_reward"]
    assert len(set(means[:3].tolist())) == 1
    assert means[3:].tolist() == [0.1, 0.1]
