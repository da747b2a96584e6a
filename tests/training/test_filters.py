"""What is dropped before training is counted, once, under the reason that applied."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.training._filters import (
    DROP_REASONS,
    Filters,
    SoftOverlong,
    filter_group,
)
from eval_protocol_rft.training._prompt_groups import group_rows as read
from eval_protocol_rft.training._types import PromptGroup, TrainingDataError
from tests.training_rows import completion, failed_row, scored


def group(*rewards: float | None, **kwargs: Any) -> PromptGroup:
    return read([scored("a", *rewards, **kwargs)])[0]


def left_of(
    made: PromptGroup, relative: bool = True, **filters: Any
) -> tuple[PromptGroup | None, dict[str, int]]:
    left, dropped = filter_group(made, Filters(**filters), relative=relative)
    return left, dict(dropped)


def lengths(*tokens: int) -> list[tuple[list[int], list[float]]]:
    return [completion(i, n) for i, n in enumerate(tokens)]


def test_unscored_and_failed_completions_are_dropped_and_counted():
    left, dropped = left_of(group(1.0, None, 0.0, failures=2))
    assert left is not None
    assert left.rewards.tolist() == [1.0, 0.0]
    assert [t.completion for t in left.trajectories] == [0, 2]
    assert dropped == {"failed": 2, "unscored": 1}


def test_a_failed_rollout_counts_as_one_row():
    (failed,) = read([failed_row("a")])
    assert left_of(failed) == (None, {"failed_row": 1})


def test_equal_rewards_are_dropped_where_the_group_is_the_baseline():
    equal = group(0.1, 0.1, 0.1, None)
    assert left_of(equal) == (None, {"unscored": 1, "zero_variance": 3})
    assert left_of(equal, relative=False)[0] is not None
    assert left_of(equal, zero_variance="keep")[0] is not None
    assert left_of(equal, relative=False, zero_variance="drop")[0] is None


def test_a_group_of_one_is_too_small_only_where_others_are_needed():
    one = group(1.0, None)
    assert left_of(one) == (None, {"unscored": 1, "small_group": 1})
    assert left_of(one, relative=False)[1] == {"unscored": 1}
    assert left_of(group(1.0, 0.0, 0.0), min_group_size=4) == (None, {"small_group": 3})


def test_components_vary_or_the_group_has_no_gradient():
    metrics = [{"format": 0.5}, {"format": 0.5}]
    made = group(1.0, 0.0, metrics=metrics)
    left, dropped = filter_group(made, Filters(), relative=True, components=("format",))
    assert (left, dict(dropped)) == (None, {"zero_variance": 2})
    differing = group(1.0, 1.0, metrics=[{"format": 0.5}, {}])
    assert filter_group(differing, Filters(), relative=True, components=("format",))[0] is not None


@pytest.mark.parametrize(
    ("choice", "rewards", "trains", "dropped"),
    [
        ("keep", [1.0, 0.0, 0.5], (True, True, True), {}),
        ("mask", [1.0, 0.0, 0.5], (True, False, True), {"masked": 1}),
        ("drop", [1.0, 0.5], (True, True), {"truncated": 1}),
    ],
)
def test_a_truncated_completion_is_kept_masked_or_dropped(choice, rewards, trains, dropped):
    left, counts = left_of(group(1.0, 0.0, 0.5, truncated=[1]), truncated=choice)
    assert left is not None
    assert left.rewards.tolist() == rewards
    assert (tuple(t.trains for t in left.trajectories), counts) == (trains, dropped)


def test_a_group_in_which_everything_is_masked_gives_nothing():
    assert left_of(group(1.0, 0.0, truncated=[0, 1]), truncated="mask") == (None, {"masked": 2})


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"max_completion_tokens": 4}, [0, 1]),
        ({"max_completion_tokens": 3}, [0]),
        ({"max_sequence_tokens": 7}, [0, 1]),  # the prompt has 3 tokens
        ({"max_sequence_tokens": 6}, [0]),
    ],
)
def test_length_limits_count_sampled_tokens_or_the_whole_sequence(limits, kept):
    made = group(1.0, 0.0, 0.5, completions=lengths(3, 4, 5))
    left, dropped = left_of(made, relative=False, **limits)
    assert left is not None
    assert [t.completion for t in left.trajectories] == kept
    assert dropped == {"too_long": 3 - len(kept)}


def test_staleness_is_the_distance_in_the_list_of_versions():
    made = group(1.0, 0.0, 0.5, 0.25, 0.0, versions=["v1", "v2", "v3", None, "other"])
    left, dropped = left_of(made, max_staleness=1, policy_versions=["v1", "v2", "v3"])
    assert left is not None
    assert [t.policy_version for t in left.trajectories] == ["v2", "v3"]
    assert dropped == {"stale": 1, "unknown_version": 2}
    assert left_of(made)[1] == {}
    with pytest.raises(TrainingDataError, match="max_staleness needs policy_versions"):
        Filters(max_staleness=1)


def test_a_completion_that_spans_versions_is_as_stale_as_the_oldest_of_them():
    versions = ["v1", "v2", "v3"]
    made = group(
        *(1.0, 0.0, 0.5, 0.25),
        versions=["v3", "v3", "v3", "v2"],
        first_policy_versions=["v1", "v2", "lost", None],
    )
    left, dropped = left_of(made, max_staleness=1, policy_versions=versions)
    assert left is not None
    assert [t.completion for t in left.trajectories] == [1, 3]
    assert dropped == {"stale": 1, "unknown_version": 1}


def test_completions_that_span_versions_can_be_left_out():
    made = group(1.0, 0.0, 0.5, versions=["v2"] * 3, first_policy_versions=[None, "v1", None])
    assert left_of(made)[1] == {}
    left, dropped = left_of(made, mixed_versions="drop")
    assert left is not None
    assert [t.completion for t in left.trajectories] == [0, 2]
    assert dropped == {"mixed_versions": 1}


def test_the_soft_overlong_penalty_by_hand():
    shaping = SoftOverlong(max_tokens=10, cache_tokens=4)
    assert shaping.penalty([1, 6, 7, 8, 10, 11]).tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    made = group(1.0, 0.0, completions=lengths(8, 6))
    left, _ = left_of(made, soft_overlong=shaping)
    assert left is not None
    assert left.rewards.tolist() == [0.5, 0.0]
    assert made.rewards.tolist() == [1.0, 0.0]
    with pytest.raises(TrainingDataError, match="cache_tokens must lie between 1 and"):
        SoftOverlong(max_tokens=4, cache_tokens=5)


def test_the_overlong_penalty_makes_no_signal_of_answers_that_earned_the_same():
    """DAPO (arXiv:2503.14476) filters on what a group earned, and shapes what is left."""
    shaping = SoftOverlong(max_tokens=10, cache_tokens=4)
    for reward in (0.0, 1.0):
        same = group(reward, reward, completions=lengths(6, 8))
        assert left_of(same, soft_overlong=shaping) == (None, {"zero_variance": 2})
        kept, _ = left_of(same, soft_overlong=shaping, zero_variance="keep")
        assert kept is not None
        assert kept.rewards.tolist() == [reward, reward - 0.5]


@pytest.mark.parametrize(
    "rewards", [(0.1 + 0.2, 0.3), (0.1, float(np.float32(0.1))), (0.3 - 0.1 - 0.2, 0.0)]
)
def test_rewards_that_differ_by_rounding_are_equal(rewards):
    assert rewards[0] != rewards[1]
    assert left_of(group(*rewards)) == (None, {"zero_variance": 2})
    assert left_of(group(0.3, 0.3001))[0] is not None


def test_the_soft_overlong_penalty_agrees_with_trl():
    rewards = pytest.importorskip("trl.rewards")
    sizes = list(range(1, 140, 7))
    theirs = rewards.get_soft_overlong_punishment(100, 30)(completion_ids=[[0] * n for n in sizes])
    ours = SoftOverlong(max_tokens=100, cache_tokens=30).penalty(sizes)
    assert ours == pytest.approx(theirs)


@given(
    rewards=st.lists(st.sampled_from([None, 0.0, 1.0]), min_size=1, max_size=5),
    cut=st.sets(st.integers(0, 4)),
    failures=st.integers(0, 2),
    tokens=st.lists(st.integers(1, 6), min_size=5, max_size=5),
    truncated=st.sampled_from(["keep", "mask", "drop"]),
    relative=st.booleans(),
    size=st.sampled_from([None, 1, 3]),
    longest=st.sampled_from([None, 3]),
)
def test_every_completion_trains_or_is_counted_once(
    rewards, cut, failures, tokens, truncated, relative, size, longest
):
    made = group(
        *rewards,
        completions=lengths(*tokens[: len(rewards)]),
        truncated=[i for i in cut if i < len(rewards)],
        failures=failures,
    )
    filters = Filters(truncated=truncated, min_group_size=size, max_completion_tokens=longest)
    left, dropped = filter_group(made, filters, relative=relative)
    trained = sum(t.trains for t in left.trajectories) if left else 0
    assert trained + sum(dropped.values()) == len(rewards) + failures
    assert set(dropped) <= set(DROP_REASONS)
    assert all(count > 0 for count in dropped.values())
    if left is not None:
        assert trained > 0
        assert not np.isnan(left.rewards).any()
    assert Counter(dropped)["unscored"] == rewards.count(None)
