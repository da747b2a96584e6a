"""A row is read exactly or refused with its name."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft._segments import TokenBuffer, lay_out
from eval_protocol_rft.record import RecordError, RolloutRecord
from eval_protocol_rft.training._batch import build_batch
from eval_protocol_rft.training._prompt_groups import group_rows
from eval_protocol_rft.training._types import Segment, TrainingDataError
from tests.training_episodes import episodes_extra
from tests.training_rows import completion, contents_of, record, row, scored


def test_metrics_become_components_and_an_invalid_one_is_missing():
    metrics = [
        {"format": {"score": 0.5, "is_score_valid": True}, "speed": 2, "note": "fine"},
        {"format": {"score": 1.0, "is_score_valid": False}, "speed": None},
    ]
    (group,) = group_rows([scored("a", 1.0, 0.0, metrics=metrics)])
    values = group.components(("format", "speed"))
    assert np.array_equal(values, [[0.5, 2.0], [np.nan, np.nan]], equal_nan=True)
    assert "note" not in group.trajectories[0].components


def test_an_evaluation_row_and_its_json_read_alike():
    models = pytest.importorskip("eval_protocol.models")
    plain = scored("a", 1.0, None, truncated=[1], failures=1)
    evaluated = models.EvaluationRow.model_validate(plain)
    dumped = json.loads(evaluated.model_dump_json())
    (from_object,), (from_json,) = group_rows([evaluated]), group_rows([dumped])
    assert contents_of(from_object) == contents_of(from_json) == contents_of(group_rows([plain])[0])
    assert from_object.key == from_json.key == ("exp", "a", "m")
    evaluated.rollout_status = models.Status.rollout_error("boom")
    assert group_rows([evaluated])[0].failed_rows == ("boom",)


@pytest.mark.parametrize("code", [1, 4, 13, 14, 16, 103])
def test_what_an_earlier_rollout_left_on_a_row_that_failed_is_not_trained_on(code):
    stale = scored("a", 1.0, 0.0)
    stale["rollout_status"] = {"code": code, "message": "too late", "details": []}
    (group,) = group_rows([stale])
    assert (group.failed_rows, group.trajectories) == (("too late",), ())


@pytest.mark.parametrize(
    ("result", "reward"),
    [
        ({"score": 0.75, "is_score_valid": True}, 0.75),
        ({"score": 0.0, "is_score_valid": False}, None),
    ],
)
def test_one_completion_may_carry_its_reward_as_the_evaluation_result(result, reward):
    only = row("a", record(None, completions=[completion(0)]), result=result)
    assert group_rows([only])[0].trajectories[0].reward == reward


def broken(**changes: Any) -> dict[str, Any]:
    extra = record([1.0, 0.0])
    extra.update(changes)
    return row("r9", extra)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("r9", None), "no rollout record"),
        (row("r9", {}), "run 0: no rollout record"),
        (broken(rft_schema=99), "run 0: .*rft_schema is 99"),
        (broken(prompt_ids=[]), "prompt_ids must hold at least one id"),
        (broken(prompt_ids=None), "prompt_ids"),
        (broken(completion_ids=None), "completion_ids"),
        (broken(completion_ids=[[1, 2]]), "inference_logprobs has 2 entries for 1 completions"),
        (broken(completion_ids=[[1], [2, 3]]), "completion 0: 1 token ids and 2 logprobs"),
        (broken(completion_ids=[[1, 2], []]), "completion 1: 0 token ids and 2 logprobs"),
        (broken(completion_ids=[[1, 2], 7]), "completion 1: completion_ids is int"),
        (broken(completion_ids=[[1, 2], "ab"]), "completion 1: completion_ids is str"),
        (broken(completion_ids=[[1, 2], [3, 4.5]]), "completion 1: completion_ids: "),
        (broken(completion_ids=[[1, 2], [3, None]]), "completion 1: completion_ids: "),
        (broken(completion_ids=[[1, 2], [3, -4]]), r"completion 1: completion_ids\[1\] is -4"),
        (broken(completion_ids=[[1, 2], [3, 2**63]]), "completion 1: completion_ids: "),
        (broken(inference_logprobs=[[-1, -1], [-1, None]]), "completion 1: inference_logprobs: "),
        (broken(inference_logprobs=[[-1, -1], [-1, "0"]]), "completion 1: inference_logprobs: "),
        (
            broken(inference_logprobs=[[-1, math.nan], [-1, -1]]),
            r"completion 0: inference_logprobs\[1\] is nan",
        ),
        (
            broken(inference_logprobs=[[-1, -1], [0.25, -1]]),
            r"completion 1: inference_logprobs\[0\] is 0.25",
        ),
        (
            broken(inference_logprobs=[[-1e300, -1], [-1, -1]]),
            r"completion 0: inference_logprobs",
        ),
        (broken(rewards=None), "2 completions without rewards. Put @score_each_completion"),
        (broken(rewards=[1.0]), "rewards has 1 entries for 2 completions"),
        (broken(rewards=[1.0, math.inf]), "completion 1: reward is inf"),
        (broken(finish_reasons=["stop"]), "finish_reasons has 1 entries for 2 completions"),
        (
            broken(completion_ids=[np.array([1.0, 2.0]), [3, 4]]),
            "completion 0: completion_ids is an array of float64",
        ),
        (
            broken(inference_logprobs=[[-1, -1], np.array([[-1.0], [-1.0]])]),
            r"completion 1: inference_logprobs is an array of float64 with shape \(2, 1\)",
        ),
    ],
)
def test_a_row_that_breaks_the_contract_is_an_error_that_names_row_and_completion(bad, message):
    with pytest.raises(TrainingDataError, match=f"row 'r9'.*{message}"):
        group_rows([scored("fine", 1.0, 0.0), bad])


@given(
    prompt=st.lists(st.integers(0, 200_000), min_size=1, max_size=5),
    made=st.lists(
        st.lists(
            st.tuples(st.integers(0, 2**31 - 1), st.floats(-50, 0, width=32)),
            min_size=1,
            max_size=6,
        ),
        min_size=1,
        max_size=4,
    ),
    block=st.integers(1, 12),
    as_arrays=st.booleans(),
)
def test_lists_and_arrays_come_out_of_the_buffer_as_they_went_in(prompt, made, block, as_arrays):
    ids = [[token for token, _ in one] for one in made]
    values = [[value for _, value in one] for one in made]
    convert = np.array if as_arrays else (lambda x: x)
    buffer = TokenBuffer(block_tokens=block)
    for _ in range(2):  # the second time may start inside a block
        slabs = lay_out(
            convert(prompt),
            [convert(x) for x in ids],
            [convert(x) for x in values],
            buffer,
            [f"completion {i}" for i in range(len(ids))],
        )
        assert [s.tokens.tolist() for s in slabs] == [prompt + x for x in ids]
        assert [s.logprobs.tolist() for s in slabs] == [[0.0] * len(prompt) + x for x in values]
        assert [s.loss_mask.tolist() for s in slabs] == [
            [0.0] * len(prompt) + [1.0] * len(x) for x in ids
        ]


_VALUES = st.one_of(
    st.none(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=2),
    st.lists(st.one_of(st.none(), st.integers(-1, 5), st.floats()), max_size=3),
    st.lists(st.lists(st.one_of(st.integers(-1, 5), st.floats(-2, 1)), max_size=3), max_size=3),
)
_INTACT = record([1.0, 0.0])


@given(key=st.sampled_from(sorted(_INTACT)), value=_VALUES)
def test_a_record_with_any_field_replaced_is_read_exactly_or_refused(key, value):
    extra = {**copy.deepcopy(_INTACT), key: value}
    try:
        (group,) = group_rows([row("a", extra)])
    except TrainingDataError as error:
        refused = str(error)
        assert "row 'a'" in refused
        return
    for t, ids, values, reward in zip(
        group.trajectories,
        extra["completion_ids"],
        extra["inference_logprobs"],
        extra["rewards"],
        strict=True,
    ):
        assert t.tokens.tolist() == [*extra["prompt_ids"], *ids]
        sampled = t.logprobs[len(extra["prompt_ids"]) :]
        assert np.array_equal(sampled, np.array(values, np.float32))
        assert t.reward == reward


@pytest.mark.parametrize("stand_in", [-9999.0, -1e9, float(np.finfo(np.float32).min)])
def test_a_stand_in_for_minus_infinity_is_no_logprob_of_a_sampled_token(stand_in):
    broken = scored("a", 1.0, completions=[([7, 8], [-0.5, stand_in])])
    with pytest.raises(TrainingDataError, match=r"row 'a'.*completion 0.*\[1\].*stands for -inf"):
        build_batch([broken])
    with pytest.raises(
        RecordError, match=r"completion 0: inference_logprobs\[1\] .*stands for -inf"
    ):
        RolloutRecord.from_extra(broken["execution_metadata"]["extra"])
    with pytest.raises(RecordError, match=r"logprobs\[1\] .*stands for -inf"):
        Segment(tokens=[1, 2], logprobs=[0.0, stand_in], loss_mask=[0, 1])
    extra = episodes_extra([[[(3, 1)]], [[(3, 1)], [(1, 1)]]], [1.0, 0.0])
    extra["trajectories"][1][1]["logprobs"][1] = stand_in
    with pytest.raises(RecordError, match=r"completion 1, segment 1: logprobs\[1\] .*stands"):
        RolloutRecord.from_extra(extra)
