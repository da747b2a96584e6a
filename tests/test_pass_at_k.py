from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.scoring._pass_at_k import pass_at_k


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
