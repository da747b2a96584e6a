"""Rows of a rollout file as rows of Eval Protocol, and back."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from eval_protocol.models import EvaluationRow
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from eval_protocol_rft.data._format import CompletionRow, FileMetadata, metadata_of
from eval_protocol_rft.data._from_ep import FailedRolloutError, from_row
from eval_protocol_rft.data._records import part_of
from eval_protocol_rft.data._to_ep import to_row
from eval_protocol_rft.record import RecordError, RolloutRecord, Score
from eval_protocol_rft.training import PromptGroup, TokenBuffer, group_rows
from tests.convert_rows import evaluated, files, rounded, same, through_json
from tests.scored_rows import asked, roll_out
from tests.training_rows import contents_of

BARE = FileMetadata(prompt_kind="messages")


def dumped(row: EvaluationRow) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.json.decode(row.model_dump_json())
    return values


def by_group(rows: list[CompletionRow]) -> list[list[CompletionRow]]:
    numbers = dict.fromkeys(row.data_idx for row in rows)
    return [[row for row in rows if row.data_idx == number] for number in numbers]


@settings(max_examples=60, deadline=None)
@given(files())
def test_a_file_survives_being_rows(file: Any) -> None:
    metadata = metadata_of(file[0])
    for group in by_group(file[1]):
        row = through_json(to_row(group, metadata))
        back = from_row(row, 99, prompt_kind=metadata.prompt_kind)
        assert all(map(same, back, group))
        assert len(back) == len(group)


@settings(max_examples=60, deadline=None)
@given(files())
def test_a_file_survives_being_rows_that_eval_protocol_loads_and_dumps(file: Any) -> None:
    metadata = metadata_of(file[0])
    for group in by_group(file[1]):
        loaded = EvaluationRow.model_validate(to_row(group, metadata))
        back = from_row(dumped(loaded), 99, prompt_kind=metadata.prompt_kind)
        assert all(map(same, back, group))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_row_of_eval_protocol_survives_being_in_a_file(data: st.DataObject) -> None:
    row = data.draw(evaluated(7))
    completions = from_row(row, 7, prompt_kind="messages")
    again = to_row(completions, BARE)
    assert rounded(again) == rounded(row)
    assert msgspec.json.encode(EvaluationRow.model_validate(again).model_dump(mode="json"))
    once_more = from_row(through_json(again), 99, prompt_kind="messages")
    assert all(map(same, once_more, completions))


@settings(max_examples=40, deadline=None)
@given(files())
def test_survivors_are_a_record_and_a_group_of_failures_is_a_failed_rollout(file: Any) -> None:
    for group in by_group(file[1]):
        row = to_row(group, metadata_of(file[0]))
        extra = row["execution_metadata"]["extra"]
        survivors = [completion for completion in group if not completion.failed]
        assert (row["rollout_status"]["code"] == 13) == (not survivors)
        if survivors:
            record = RolloutRecord.from_extra(through_json(row)["execution_metadata"]["extra"])
            assert [f.index for f in record.failures] == [c.sample_idx for c in group if c.failed]
            assert record.completions_text == [c.response for c in survivors]
            assert (record.rewards is not None) == any("reward" in c.scores for c in survivors)
        else:
            assert "rft_schema" not in extra


def trained(group: PromptGroup) -> Any:
    own = ("components", "score_error", "policy_version", "first_policy_version", "completion")
    also = ("row_id", "bias", "prompt_length", "num_sampled")
    return (
        (group.key, group.failed_rows, group.failures, group.tokenizer, contents_of(group)),
        [[getattr(t, name) for name in (*own, *also)] for t in group.trajectories],
    )


@settings(max_examples=60, deadline=None)
@given(files(), st.data())
def test_columns_train_as_the_rows_of_eval_protocol_do_that_they_are_of(
    file: Any, data: st.DataObject
) -> None:
    imported = data.draw(evaluated(7))
    assume(imported["input_metadata"].get("row_id"))
    metadata = metadata_of(file[0])
    for group, of in [
        *((group, metadata) for group in by_group(file[1])),
        (from_row(imported, 7, prompt_kind="messages"), BARE),
    ]:
        survivors = [row for row in group if not row.failed]
        if not survivors or any("reward" in row.scores for row in survivors):
            [expected] = group_rows([through_json(to_row(group, of))])
            assert trained(part_of(group, of, TokenBuffer())) == trained(expected)


def rolled_out(*texts: str, **options: Any) -> dict[str, Any]:
    return dumped(roll_out(asked("1+1?"), texts, **options))


def test_what_an_evaluator_says_of_a_generated_row_later_is_kept() -> None:
    generated = CompletionRow(
        row_id="r",
        data_idx=4,
        sample_idx=0,
        prompt=[{"role": "user", "content": "q"}],
        response="a",
        prompt_ids=np.array([1], np.int32),
        completion_ids=np.array([2], np.int32),
        logprobs=np.array([-1], np.float32),
        finish_reason="stop",
        truncated=False,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        original={"level": 3},
    )
    row = through_json(to_row([generated], BARE))
    row["evaluation_result"] = {"score": 1.0}
    [back] = from_row(row, 0, prompt_kind="messages")
    assert (back.data_idx, back.original) == (4, {"level": 3})
    again = to_row([back], BARE)
    assert again["evaluation_result"] == {"score": 1.0}
    [once_more] = from_row(through_json(again), 0, prompt_kind="messages")
    assert same(back, once_more)


def test_a_row_that_was_rolled_out_anew_is_not_taken_for_the_file_it_came_from() -> None:
    first = from_row(rolled_out("a", "b"), 5, prompt_kind="messages")
    first[0].temperature = 0.25
    stale = to_row(first, BARE)["execution_metadata"]["extra"]["rollout_file"]
    again = rolled_out("c", "d", first_token=300)
    again["execution_metadata"]["extra"]["rollout_file"] = stale
    rows = from_row(again, 8, prompt_kind="messages")
    assert [(row.response, row.data_idx, row.temperature) for row in rows] == [
        ("c", 8, 1.0),
        ("d", 8, 1.0),
    ]


def test_the_answer_is_the_first_completion_that_was_not_filtered_away() -> None:
    row = rolled_out("<think>no</think>a", "<think>yes</think>b")
    row["execution_metadata"]["finish_reason"] = "length"
    rows = from_row(row, 0, prompt_kind="messages")
    filtered = to_row(rows[1:], BARE)
    assert filtered["messages"] == [
        row["messages"][0],
        {"role": "assistant", "content": "b", "reasoning_content": "yes"},
    ]
    assert filtered["execution_metadata"]["finish_reason"] == "stop"
    [left] = from_row(through_json(filtered), 0, prompt_kind="messages")
    assert (left.sample_idx, left.prompt) == (1, [{"role": "user", "content": "1+1?"}])
    assert to_row([left], BARE)["messages"] == filtered["messages"]


def test_a_row_of_which_only_failures_were_kept_has_no_answer() -> None:
    rows = from_row(rolled_out("a", num_failed=1), 0, prompt_kind="messages")
    row = to_row(rows[1:], BARE)
    assert [message["role"] for message in row["messages"]] == ["user"]
    assert row["rollout_status"]["code"] == 13
    [failed] = from_row(through_json(row), 0, prompt_kind="messages")
    assert (failed.sample_idx, failed.error) == (1, "-")


def test_scores_given_after_the_import_are_in_the_row() -> None:
    rows = from_row(rolled_out("a", "b"), 0, prompt_kind="messages")
    rows[1].scores = {"reward": Score(reward=0.5, reason="half")}
    extra = to_row(rows, BARE)["execution_metadata"]["extra"]
    assert extra["rewards"] == [None, 0.5]
    assert extra["completion_results"][1]["reason"] == "half"


def test_traces_that_are_not_the_first_completion_are_kept() -> None:
    row = rolled_out("a")
    traces = row["execution_metadata"]["extra"]["token_turn_traces"] * 2
    row["execution_metadata"]["extra"]["token_turn_traces"] = traces
    [completion] = from_row(row, 0, prompt_kind="messages")
    assert to_row([completion], BARE)["execution_metadata"]["extra"]["token_turn_traces"] == traces


def test_how_a_row_was_sampled_is_never_guessed() -> None:
    [row] = from_row(rolled_out("a"), 0, prompt_kind="messages")
    row.evaluation_row = row.temperature = None
    with pytest.raises(RecordError, match="nor the columns temperature, top_p and top_k say how"):
        to_row([row], BARE)
    row.temperature, row.top_p = 0.5, 0.9
    sampling = to_row([row], BARE)["execution_metadata"]["extra"]["sampling"]
    assert (sampling["temperature"], sampling["support_truncated"]) == (0.5, True)


def failed() -> dict[str, Any]:
    row = rolled_out("a")
    row["rollout_status"] = {"code": 13, "message": "no server", "details": []}
    return row


def twice() -> dict[str, Any]:
    row = rolled_out("a", "b")
    row["execution_metadata"]["extra"]["sampling"]["indices"] = [1, 1]
    return row


def with_image() -> dict[str, Any]:
    row = rolled_out("a")
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    row["messages"][0]["content"] = [{"type": "text", "text": "q"}, part]
    return row


def huge() -> dict[str, Any]:
    row = rolled_out("a")
    row["execution_metadata"]["extra"]["prompt_ids"] = [2**31]
    return row


def broken() -> dict[str, Any]:
    row = rolled_out("a")
    row["execution_metadata"]["extra"]["rollout_file"] = {"data_idx": "x"}
    return row


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (failed, FailedRolloutError, "it has no rollout; its rollout status is 'no server'"),
        (lambda: dumped(asked("q")), FailedRolloutError, "it has no rollout"),
        (twice, RecordError, "two completions have the index 1"),
        (with_image, RecordError, "a message holds 'image_url'"),
        (huge, RecordError, r"prompt_ids\[0\] is 2147483648: not a token id"),
        (broken, RecordError, "broken 'rollout_file' in extra: .*data_idx"),
    ],
)
def test_a_row_that_has_no_place_in_the_file_is_refused(
    make: Any, kind: type[RecordError], message: str
) -> None:
    row = make()
    row["input_metadata"]["row_id"] = "r7"
    with pytest.raises(kind, match=f"row 'r7': {message}") as caught:
        from_row(row, 0, prompt_kind="messages")
    assert type(caught.value) is kind


def test_a_prompt_of_several_messages_is_no_text() -> None:
    row = rolled_out("a")
    row["messages"].insert(0, {"role": "system", "content": "s"})
    with pytest.raises(RecordError, match="its prompt is 2 messages"):
        from_row(row, 0, prompt_kind="text")


def test_ids_behind_the_end_are_a_column_and_were_in_the_row_before() -> None:
    row = rolled_out("a", "b", "c")
    row["execution_metadata"]["extra"]["sampling"]["past_end"] = [[], [7, 8], []]
    rows = from_row(row, 0, prompt_kind="messages")
    assert [None if r.past_end is None else r.past_end.tolist() for r in rows] == [
        None, [7, 8], None,
    ]  # fmt: skip
    assert "past_end" not in (rows[0].evaluation_row or "")
    before = json.loads(rows[0].evaluation_row or "")
    before["execution_metadata"]["extra"]["sampling"]["past_end"] = {"1": [7, 8]}
    old = [msgspec.structs.replace(r, past_end=None) for r in rows]
    for r in old:
        r.evaluation_row = json.dumps(before)
    for these in (rows, old):
        sampling = to_row(these[1:], BARE)["execution_metadata"]["extra"]["sampling"]
        assert sampling["past_end"] == [[7, 8], []]


def test_what_no_column_holds_of_a_completion_goes_with_it_when_others_are_filtered_out() -> None:
    row = rolled_out("a", "b", "c")
    row["execution_metadata"]["extra"]["sampling"] |= {
        "retry_causes": [["timeout"], [], ["unavailable 503"]],
    }
    rows = from_row(row, 0, prompt_kind="messages")
    sampling = to_row(rows[1:], BARE)["execution_metadata"]["extra"]["sampling"]
    assert sampling["retry_causes"] == [[], ["unavailable 503"]]
