"""The record of episodes: read back as written, or refused with episode, segment and index."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.record import RecordError, RolloutRecord
from eval_protocol_rft.training._prompt_groups import group_rows
from eval_protocol_rft.training._types import TrainingDataError
from tests.training_episodes import TWO_SEGMENTS, episodes_extra, shapes
from tests.training_rows import row

ONE_TURN = [[(3, 2)]]


def extra_of_two(**options: Any) -> dict[str, Any]:
    """Episode 0 has one turn, episode 1 two segments."""
    return episodes_extra([ONE_TURN, TWO_SEGMENTS], [1.0, 0.0], **options)


@given(st.lists(shapes, min_size=1, max_size=3), st.integers(0, 99))
def test_a_record_of_episodes_survives_json(made: Any, seed: int) -> None:
    extra = episodes_extra(made, [1.0] * len(made), seed=seed)
    for one in (segment for segments in extra["trajectories"] for segment in segments):
        one["logprobs"] = np.array(one["logprobs"], np.float32).tolist()  # as they are written
    read = RolloutRecord.from_extra(json.loads(json.dumps(extra)))
    again = read.to_extra()
    assert again["trajectories"] == extra["trajectories"]
    for told, written in zip(again["episodes"], extra["episodes"], strict=True):
        assert told.items() >= written.items()
    assert RolloutRecord.from_extra(json.loads(json.dumps(again))) == read


def test_a_record_of_one_turn_has_no_keys_of_episodes() -> None:
    extra = extra_of_two()
    del extra["trajectories"], extra["episodes"]
    assert not {"trajectories", "episodes"} & RolloutRecord.from_extra(extra).to_extra().keys()


@pytest.mark.parametrize(
    ("stop_reason", "finish_reason", "last"),
    [
        ("done", None, "stop"),
        ("length", None, "length"),
        ("max_episode_tokens", "length", "length"),
        ("max_turns", "stop", "stop"),
    ],
)
def test_the_last_turn_was_cut_off_where_the_stop_reason_or_the_episode_says_so(
    stop_reason: str, finish_reason: str | None, last: str
) -> None:
    extra = extra_of_two(stop_reasons=["done", stop_reason])
    extra["episodes"][1]["finish_reason"] = finish_reason
    episodes = RolloutRecord.from_extra(extra).episodes
    assert episodes is not None
    assert [episode.last_finish_reason for episode in episodes] == ["stop", last]


def test_logprobs_may_have_been_float32_on_their_way_into_a_segment() -> None:
    extra = extra_of_two()
    for segments in extra["trajectories"]:
        for one in segments:
            one["logprobs"] = np.array(one["logprobs"], np.float32).tolist()
    assert extra["trajectories"][0][0]["logprobs"][3:] != extra["inference_logprobs"][0]
    RolloutRecord.from_extra(extra)
    group_rows([row("a", extra)])


def put(key: str, index: int, value: Any) -> Callable[[dict[str, Any]], None]:
    """Change one number of episode 1, segment 1: mask 0 0 0 0 1."""

    def change(extra: dict[str, Any]) -> None:
        extra["trajectories"][1][1][key][index] = value

    return change


def first(key: str, index: int, value: Any) -> Callable[[dict[str, Any]], None]:
    """Change one number of episode 1, segment 0: mask 0 0 0 1 1 0 0 1 1 1."""

    def change(extra: dict[str, Any]) -> None:
        extra["trajectories"][1][0][key][index] = value

    return change


BROKEN_TOKENS = [
    (put("loss_mask", 2, 2), r"1, segment 1: loss_mask\[2\] is 2"),
    (put("loss_mask", 0, 1), r"1, segment 1: loss_mask\[0\] is 1"),
    (put("loss_mask", 4, 0), r"1, segment 1: loss_mask "),
    (put("tokens", 3, -7), r"1, segment 1: tokens\[3\] is -7"),
    (put("logprobs", 4, math.nan), r"1, segment 1: logprobs\[4\] is nan"),
    (put("logprobs", 4, -math.inf), r"1, segment 1: logprobs\[4\] is -inf"),
    (put("logprobs", 4, 0.5), r"1, segment 1: logprobs\[4\] is 0.5"),
    (put("logprobs", 1, -0.5), r"1, segment 1: logprobs\[1\] is -0.5 where loss_mask is 0"),
    (lambda e: e["trajectories"][1][1]["tokens"].pop(), r"1, segment 1: 4 tokens, 5 logprobs"),
    (first("tokens", 1, 77), r"1, segment 0: tokens\[1\] is 77, and 2 in the record's prompt"),
    (first("tokens", 4, 77), r"1, segment 0: tokens\[4\] is 77, and \d+ in the record's prompt"),
    (first("logprobs", 3, -9.0), r"1, segment 0: logprobs\[3\] is -9"),
    (lambda e: e["completion_ids"][1].append(5) or e["inference_logprobs"][1].append(-0.1),
     r"1, segment 0: tokens\[5\] is"),
]  # fmt: skip

BROKEN_EPISODES = [
    (lambda e: e.pop("episodes"), "episodes is missing: trajectories and episodes come together"),
    (lambda e: e["episodes"].pop(), "episodes has 1 entries for 2 completions"),
    (lambda e: e["trajectories"].pop(), "trajectories has 1 entries for 2 completions"),
    (lambda e: e["trajectories"][1].clear(), "episode 1: 0 segments for 3 turns"),
    (lambda e: e["episodes"][1].update(turns=1), "episode 1: 2 segments for 1 turns"),
    (lambda e: e["episodes"][0].update(turns=0), "episode 0: turns is 0"),
    (lambda e: e["episodes"][1].update(step_rewards=[0.0] * 4), "episode 1: step_rewards has 4"),
    (
        lambda e: e["episodes"][1].update(step_rewards=[0.0, math.nan]),
        r"episode 1: step_rewards\[1\] is nan",
    ),
    (
        lambda e: e["episodes"][1].update(stop_reason="length", finish_reason="stop"),
        'episode 1: stop_reason is "length" and',
    ),
    (
        lambda e: e["episodes"][0].update(stop_reason="length"),
        'episode 0: its only turn has the finish reason "stop" in finish_reasons and "length" here',
    ),
    (lambda e: e.update(trajectories=7), "trajectories"),
    (lambda e: e["episodes"][1].pop("stop_reason"), "stop_reason"),
]


@pytest.mark.parametrize(("change", "message"), [*BROKEN_TOKENS, *BROKEN_EPISODES])
def test_what_breaks_the_contract_is_refused_with_its_place(
    change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    extra = extra_of_two()
    change(extra)
    with pytest.raises(RecordError, match=message):
        RolloutRecord.from_extra(extra)


@pytest.mark.parametrize(("change", "message"), [*BROKEN_TOKENS, *BROKEN_EPISODES])
def test_training_refuses_the_same_with_row_and_place(
    change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    extra = extra_of_two()
    change(extra)
    # Training names completions; here their numbers are those of the episodes.
    with pytest.raises(TrainingDataError, match=rf"row 'r9', run 0.*{message}"):
        group_rows([row("r9", extra)])


def test_a_segment_that_is_no_object_is_refused_by_training() -> None:
    extra = extra_of_two()
    extra["trajectories"][1][1] = [1, 2]
    with pytest.raises(TrainingDataError, match="completion 1, segment 1: needs tokens, logprobs"):
        group_rows([row("a", extra)])


_VALUES = st.one_of(
    st.none(), st.integers(-2, 3), st.floats(), st.text(max_size=2), st.lists(st.floats())
)


@given(
    st.sampled_from([("tokens", 4), ("tokens", 8), ("logprobs", 3), ("logprobs", 6)]),
    st.integers(0, 1),
    _VALUES,
)
def test_any_value_in_a_segment_is_read_exactly_or_refused(
    place: tuple[str, int], which: int, value: Any
) -> None:
    extra = copy.deepcopy(episodes_extra([ONE_TURN, [[(3, 2), (2, 3)], [(4, 6)]]], [1.0, 0.0]))
    key, index = place
    extra["trajectories"][1][which][key][index] = value
    try:
        (group,) = group_rows([row("a", extra)])
    except TrainingDataError as error:
        refused = str(error)
        assert "completion 1, segment" in refused
        return
    read = getattr(group.trajectories[1].segments[which], key)
    assert read[index] == np.asarray(value, read.dtype)
