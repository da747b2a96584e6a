"""Baselines by length and by the greedy completion, and advantages of the best of several: by hand,
in their limits, and on the way from rows."""

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
from eval_protocol_rft.training._batch import build_batch
from eval_protocol_rft.training._filters import Filters, SoftOverlong
from eval_protocol_rft.training._types import EmptyBatchError, TrainingDataError
from tests.training_rows import completion, record, row, scored

tame = hnp.arrays(np.float64, (3, 5), elements=st.sampled_from([0.0, 0.25, 1.0, -1.0, np.nan]))
binary = hnp.arrays(np.float64, (2, 6), elements=st.sampled_from([0.0, 1.0, np.nan]))


def test_opo_by_hand():
    # mean weighted by length: (1 * 1 + 3 * 0 + 4 * 0.5) / 8
    got = advantages.opo([1.0, 0.0, 0.5, None], lengths=[1, 3, 4, 1000])
    assert got == pytest.approx([0.625, -0.375, 0.125, 0.0])


@given(rewards=tame, length=st.integers(1, 50))
def test_opo_with_equal_lengths_is_dr_grpo(rewards, length):
    got = advantages.opo(rewards, lengths=np.full(rewards.shape, length))
    assert got == pytest.approx(advantages.dr_grpo(rewards), abs=1e-12)


@given(
    rewards=tame,
    lengths=hnp.arrays(np.int64, (3, 5), elements=st.integers(1, 9)),
)
def test_opo_sums_to_zero_by_tokens_and_never_trains_what_is_missing(rewards, lengths):
    got = advantages.opo(rewards, lengths=lengths)
    assert np.isfinite(got).all()
    assert not got[np.isnan(rewards)].any()
    there = np.where(np.isnan(rewards), 0, lengths)
    assert (got * there).sum(axis=-1) == pytest.approx(np.zeros(3), abs=1e-9)


def test_opo_estimates_the_gradient_of_the_mean_reward_with_the_least_variance():
    """Answers of 1 and of 9 tokens, whose gradients have norms sqrt(1) and sqrt(9): of all constant
    baselines, the mean weighted by length has the least variance."""
    rewards, lengths, p = np.array([0.2, 1.0]), np.array([1.0, 9.0]), np.array([0.5, 0.5])

    def variance(baseline: float) -> float:
        # Of (r - b) g, where g has mean 0 and the square of its norm is the length.
        return float(p @ ((rewards - baseline) ** 2 * lengths))

    best = rewards[1] - advantages.opo(rewards, lengths=lengths)[1]
    others = [variance(best + step) for step in (-0.1, -0.01, 0.01, 0.1)]
    assert variance(best) < min(others)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([1, 2], "a length per reward"), ([1, 0, 2], r"lengths\[1\] is 0.0"), ([1, 2, None], "nan")],
)
def test_lengths_that_are_none_are_refused(lengths, message):
    with pytest.raises(ValueError, match=message):
        advantages.opo([1.0, 0.0, 0.5], lengths=lengths)


def test_remax_by_hand_and_its_refusals():
    got = advantages.remax([[1.0, 0.25, None], [0.3, 0.3, 0.0]], baselines=[0.25, 0.1 + 0.2])
    assert got == pytest.approx(np.array([[0.75, 0.0, 0.0], [0.0, 0.0, -0.3]]))
    assert not got[1, :2].any(), "equal but for rounding is exactly nothing"
    with pytest.raises(ValueError, match=r"baselines\[1\] is nan"):
        advantages.remax([[1.0], [0.0]], baselines=[0.0, None])
    with pytest.raises(ValueError, match="a baseline per group"):
        advantages.remax([[1.0], [0.0]], baselines=[0.0])
    # A group without any reward needs none.
    assert not advantages.remax([[None], [0.0]], baselines=[None, 0.0]).any()


@given(rewards=tame)
def test_remax_with_a_greedy_completion_worth_nothing_is_reinforce(rewards):
    got = advantages.remax(rewards, baselines=np.zeros(3))
    assert got == pytest.approx(advantages.reinforce(rewards), abs=1e-12)


def test_gpg_by_hand():
    rewards = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    # Half of the completions have a gradient, so each counts twice.
    expected = np.array([[1.5, -0.5, -0.5, -0.5], [0, 0, 0, 0]])
    assert advantages.gpg(rewards) == pytest.approx(expected)
    # As verl counts: 5 of 8 have a reward.
    assert advantages.gpg(rewards, valid="rewards") == pytest.approx(expected / 2 * 8 / 5)
    assert advantages.gpg(rewards, by_std=True) == pytest.approx(expected / 0.5)


@given(rewards=tame)
def test_gpg_without_groups_of_one_reward_is_dr_grpo(rewards):
    varied = rewards[[len(set(group[~np.isnan(group)])) > 1 for group in rewards]]
    got = advantages.gpg(varied)
    assert got == pytest.approx(advantages.dr_grpo(varied), abs=1e-12)


def test_grpo_passk_by_hand():
    got = advantages.grpo_passk([0.2, 0.9, 0.3, None], eps=0.0)
    assert got == pytest.approx([0.0, 0.6 / np.std([0.2, 0.9, 0.3], ddof=1), 0.0, 0.0])
    assert not advantages.grpo_passk([1.0, 1.0, 0.0]).any()
    assert not advantages.grpo_passk([1.0, None]).any()


@given(rewards=hnp.arrays(np.float64, 6, elements=st.integers(-4, 4).map(float)))
def test_grpo_passk_is_the_gain_in_the_best_of_all(rewards):
    got = advantages.grpo_passk(rewards, by_std=False)
    assert got * 6 == pytest.approx(advantages.pkpo(rewards, k=6), abs=1e-9)


@given(rewards=binary)
def test_passk_of_one_is_grpo(rewards):
    got = advantages.passk(rewards, k=1)
    assert got == pytest.approx(advantages.grpo(rewards, ddof=0), abs=1e-5)


@given(rewards=binary, k=st.integers(1, 6))
def test_passk_is_the_normalised_mean_over_the_subsets_with_the_completion(rewards, k):
    got = advantages.passk(rewards, k=k)
    for group, result in zip(rewards, got, strict=True):
        places = np.flatnonzero(~np.isnan(group))
        assert not result[np.isnan(group)].any()
        if len(places) < k:
            assert not result.any()
            continue
        sets = list(itertools.combinations(places, k))
        best = np.array([group[list(chosen)].max() for chosen in sets])
        for i in places:
            with_it = [b for b, chosen in zip(best, sets, strict=True) if i in chosen]
            expected = (np.mean(with_it) - best.mean()) / (best.std() + 1e-6)
            assert result[i] == pytest.approx(expected, abs=1e-6)


def test_passk_refuses_rewards_that_are_no_pass_or_fail():
    with pytest.raises(ValueError, match=r"rewards of 0 or 1: rewards\[1\] is 0.5"):
        advantages.passk([1.0, 0.5], k=2)
    with pytest.raises(ValueError, match="k >= 1"):
        advantages.passk([1.0, 0.0], k=0)


# From rows.


def advantage_of(batch, row_id: str) -> list[float]:
    return [float(d.advantages[-1]) for d in batch.datums if d.row_id == row_id]


def test_build_batch_gives_opo_the_sampled_tokens():
    made = [completion(i, tokens) for i, tokens in enumerate((1, 3, 4))]
    rows = [row("a", record([1.0, 0.0, 0.5], completions=made)), scored("b", 1.0, 0.0)]
    batch = build_batch(rows, algorithm="opo")
    assert advantage_of(batch, "a") == pytest.approx([0.625, -0.375, 0.125])
    assert advantage_of(batch, "b") == pytest.approx([0.5, -0.5])


def test_an_estimator_of_ones_own_gets_what_it_names_and_nothing_it_has():
    def by_length(rewards, *, lengths, scale=2.0):
        return np.where(np.isnan(rewards), 0.0, lengths * scale)

    rows = [scored("a", 1.0, 0.0)]
    assert advantage_of(build_batch(rows, estimator=by_length), "a") == [4.0, 4.0]
    bound = partial(by_length, lengths=np.array([[5.0, 6.0]]))
    assert advantage_of(build_batch(rows, estimator=bound), "a") == [10.0, 12.0]


def test_a_greedy_completion_is_the_baseline_of_its_prompt_and_does_not_train():
    rows = [
        scored("a", 1.0, 1.0, 0.0),
        scored("b", 0.0),
        scored("b", 1.0, temperature=0.0),
        scored("a", 0.25, temperature=0.0),
    ]
    batch = build_batch(rows, algorithm="remax")
    assert advantage_of(batch, "a") == [0.75, 0.75, -0.25]
    assert advantage_of(batch, "b") == [-1.0]
    assert batch.dropped == {"baseline": 2}
    assert len(batch) + sum(batch.dropped.values()) == batch.stats.completions == 6
    # Rewards, as pass@k, are of what was sampled from the policy.
    assert (batch.stats.scored, batch.stats.reward_mean) == (4, 0.5)
    assert build_batch(rows, algorithm="reinforce").stats.scored == 6


def test_the_baseline_is_shaped_as_the_others_are():
    long = [completion(0, 4)]
    rows = [
        row("a", record([1.0], completions=[completion(0, 2)])),
        row("a", record([1.0], completions=long, temperature=0.0)),
    ]
    filters = Filters(soft_overlong=SoftOverlong(max_tokens=4, cache_tokens=2))
    batch = build_batch(rows, algorithm="remax", filters=filters)
    assert advantage_of(batch, "a") == [1.0]  # 1 + 0 against 1 - 1


def test_a_prompt_whose_greedy_completion_has_no_reward_is_dropped_by_name():
    rows = [
        scored("a", 1.0, 0.0),
        scored("a", None, temperature=0.0),
        scored("b", 1.0),
        scored("b", 0.0, temperature=0.0),
    ]
    batch = build_batch(rows, algorithm="remax")
    assert advantage_of(batch, "b") == [1.0]
    assert batch.dropped == {"no_baseline": 2, "baseline": 2}


def test_remax_without_any_greedy_completion_is_refused_with_what_to_do():
    with pytest.raises(TrainingDataError, match=r"once more with temperature 0 and n=1") as caught:
        build_batch([scored("a", 1.0, 0.0)], algorithm="remax")
    assert not isinstance(caught.value, EmptyBatchError)


def test_a_greedy_completion_trains_where_the_estimator_does_not_compare_with_it():
    with pytest.warns(UserWarning, match="greedy"):
        batch = build_batch([scored("a", 1.0, temperature=0.0)], algorithm="reinforce")
    assert len(batch) == 1
    assert math.isclose(advantage_of(batch, "a")[0], 1.0)
