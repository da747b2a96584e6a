"""When nothing more can come of a run: the one rule, on groups alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eval_protocol_rft.loop._watch import (
    STUCK_STEPS,
    UNSCORED_GROUPS,
    NothingToTrainOnError,
    Watch,
)
from eval_protocol_rft.sampling import Failure
from eval_protocol_rft.training import PromptGroup, Trajectory


def group(reward: float | None, *, error: str | None = None) -> PromptGroup:
    """Two completions with the same reward, or with none."""
    one = Trajectory(
        tokens=np.array([1, 2]),
        logprobs=np.array([0.0, -1.0], np.float32),
        loss_mask=np.array([0.0, 1.0], np.float32),
        reward=reward,
        score_error=error,
        row_id="r",
    )
    return PromptGroup(key=("experiment", "r", "local/model"), trajectories=(one, one))


def groups_until_the_end(watch: Watch, each: PromptGroup) -> tuple[int, str]:
    for count in range(1, 10_000):
        try:
            watch.group(each, trains=False)
        except NothingToTrainOnError as error:
            return count, str(error)
    raise AssertionError("it never ended")


def test_equal_rewards_end_a_run_after_so_many_steps_worth_of_groups() -> None:
    count, why = groups_until_the_end(Watch(groups_per_step=5), group(0.25))
    assert count == 5 * STUCK_STEPS
    assert "all completions of a prompt got the same reward (the last 0.25)" in why


def test_groups_without_a_score_end_it_sooner() -> None:
    count, why = groups_until_the_end(Watch(groups_per_step=50), group(None, error="no key"))
    assert count == UNSCORED_GROUPS
    assert why.endswith("row r, completion 0: no key")
    small, _ = groups_until_the_end(Watch(groups_per_step=1), group(None))
    assert small == STUCK_STEPS


def test_one_group_that_teaches_something_begins_the_count_anew() -> None:
    watch = Watch(groups_per_step=1)
    for _ in range(STUCK_STEPS - 1):
        watch.group(group(1.0), trains=False)
    watch.group(group(1.0), trains=True)
    assert groups_until_the_end(watch, group(1.0))[0] == STUCK_STEPS


def test_without_steps_of_its_own_only_scores_count() -> None:
    watch = Watch()
    for _ in range(10 * UNSCORED_GROUPS):
        watch.group(group(1.0), trains=False)
    assert groups_until_the_end(watch, group(None))[0] == UNSCORED_GROUPS


@pytest.mark.parametrize("key", ["r", ("experiment", "r", "local/model")])
def test_data_that_is_used_up_before_a_step_says_why(key: Any) -> None:
    watch = Watch(groups_per_step=8)
    failed = PromptGroup(
        key=key,
        trajectories=(),
        failures=(Failure(index=0, kind="timeout", message="after 5 s", attempts=1, seconds=5.0),),
    )
    watch.group(failed, trains=False)
    assert str(watch.no_step()) == (
        "no step was taken on all 1 groups: none gave a scored completion; the last: "
        "row r: timeout: after 5 s"
    )
    watch.group(group(0.5), trains=False)
    assert "got the same reward (the last 0.5)" in str(watch.no_step())
