"""Best of n, pairs and thresholds, held against what a loop over all completions says."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.data._example_rules import ExampleRules, best_of, labels_of, pairs_of
from eval_protocol_rft.data._files import JobError

rewards = st.lists(st.sampled_from([-1.0, 0.0, 0.1, 0.2, 0.3, 0.5, 1.0]), min_size=1, max_size=7)
margins = st.sampled_from([0.0, 0.1, 0.2, 0.5, 3.0])


@given(rewards, st.integers(1, 4), st.none() | st.sampled_from([0.0, 0.3]))
def test_the_best_are_those_that_none_left_out_beats(rewards, best, least) -> None:
    chosen = best_of(np.array(rewards), ExampleRules(best=best, reward_min=least))
    allowed = [i for i, reward in enumerate(rewards) if least is None or reward >= least]
    assert chosen == sorted(allowed, key=lambda i: (-rewards[i], i))[:best]


@given(rewards, margins, st.none() | st.sampled_from([0.0, 0.3]))
def test_all_pairs_are_any_two_far_enough_apart(rewards, margin, least) -> None:
    rules = ExampleRules(pairs="all", margin=margin, reward_min=least)
    chosen = pairs_of(np.array(rewards), rules, 0)
    expected = {
        (i, j) if rewards[i] > rewards[j] else (j, i)
        for i, j in combinations(range(len(rewards)), 2)
        # In tenths, which are exact: 0.3 - 0.1 is 0.19999999999999998.
        if (gap := abs(round(10 * rewards[i]) - round(10 * rewards[j]))) and gap >= 10 * margin
    }
    expected = {(i, j) for i, j in expected if least is None or rewards[i] >= least}
    assert set(chosen) == expected
    assert len(chosen) == len(expected)
    gaps = [rewards[i] - rewards[j] for i, j in chosen]
    assert gaps == sorted(gaps, reverse=True)
    some = pairs_of(np.array(rewards), ExampleRules(**_fields(rules), max_pairs=2), 0)
    assert some == chosen[:2]


def _fields(rules: ExampleRules) -> dict:
    return {name: getattr(rules, name) for name in ("pairs", "margin", "reward_min")}


@given(rewards, margins, st.integers(1, 4))
def test_best_against_worst_uses_no_completion_twice(rewards, margin, most) -> None:
    values = np.array(rewards)
    every = pairs_of(values, ExampleRules(pairs="all", margin=margin), 0)
    chosen = pairs_of(values, ExampleRules(margin=margin, max_pairs=most), 0)
    assert set(chosen) <= set(every)
    assert len(chosen) <= most
    used = [i for pair in chosen for i in pair]
    assert len(used) == len(set(used))
    assert bool(chosen) == bool(every)
    if chosen:
        i, j = chosen[0]
        assert (rewards[i], rewards[j]) == (max(rewards), min(rewards))


@given(rewards, st.integers(0, 5), st.integers(0, 99))
def test_random_pairs_are_drawn_from_all_and_again_the_same(rewards, seed, data_idx) -> None:
    values = np.array(rewards)
    every = pairs_of(values, ExampleRules(pairs="all"), data_idx)
    rules = ExampleRules(pairs="random", seed=seed, max_pairs=3)
    chosen = pairs_of(values, rules, data_idx)
    assert set(chosen) <= set(every)
    assert len(set(chosen)) == len(chosen) == min(3, len(every))
    assert chosen == pairs_of(values, rules, data_idx)
    one = ExampleRules(pairs="random", seed=seed)
    assert pairs_of(values, one, data_idx) == chosen[:1]


def test_random_pairs_of_other_seeds_and_data_rows_are_others() -> None:
    values = np.arange(20.0)
    rules = ExampleRules(pairs="random", max_pairs=5)
    assert pairs_of(values, rules, 0) != pairs_of(values, rules, 1)
    other = ExampleRules(pairs="random", max_pairs=5, seed=1)
    assert pairs_of(values, rules, 0) != pairs_of(values, other, 0)


def test_rewards_that_are_equal_but_for_rounding_are_no_pair() -> None:
    values = np.array([0.1 + 0.2, 0.3, np.float64(np.float32(0.3))])
    for pairs in ("best-worst", "all", "random"):
        assert pairs_of(values, ExampleRules(pairs=pairs), 0) == []


def test_thresholds_include_their_ends_and_leave_out_what_lies_between() -> None:
    values = np.array([0.0, 0.25, 0.5, 1.0])
    assert labels_of(values, ExampleRules()) == [(0, False), (1, False), (2, False), (3, True)]
    rules = ExampleRules(pass_threshold=0.5, fail_threshold=0.0)
    assert labels_of(values, rules) == [(0, False), (2, True), (3, True)]


def test_rules_that_contradict_themselves_or_the_target_are_refused() -> None:
    with pytest.raises(JobError, match="fail_threshold 1 is not below pass_threshold 1"):
        ExampleRules(fail_threshold=1.0)
    with pytest.raises(JobError, match="margin must be at least 0"):
        ExampleRules(margin=-0.5)
    with pytest.raises(JobError, match="best is for sft: leave it out"):
        ExampleRules(best=2).check_for("dpo")
    with pytest.raises(JobError, match="margin is for dpo and reward"):
        ExampleRules(margin=0.5).check_for("trl")
    with pytest.raises(JobError, match="keep_truncated is for sft and dpo and kto and reward"):
        ExampleRules(keep_truncated=True).check_for("verl")
    ExampleRules(margin=0.5, keep_truncated=True).check_for("reward")
