"""What an evaluator under `@score_each_completion` gets to see of a row."""

import pytest
from eval_protocol.models import EvaluateResult, EvaluationRow, Message, Status

from eval_protocol_rft.record import ARRAY_KEYS, RecordError
from eval_protocol_rft.scoring._scorer import score_each_completion
from tests.scored_rows import answered, asked, give, rewards, said


@score_each_completion
def is_right(row: EvaluationRow) -> EvaluationRow:
    return give(row, float(said(row) == "2"), reason=f"saw {said(row)}")


def raises(row):
    raise ZeroDivisionError("no luck")


def views_of(row):
    seen = []

    @score_each_completion
    def evaluator(row: EvaluationRow) -> EvaluationRow:
        seen.append(row)
        return give(row, 1.0)

    evaluator(row)
    return seen


def test_a_view_ends_in_its_completion_and_is_otherwise_the_row():
    row = answered("one", "two", finish_reasons=["stop", "length"])
    row.messages.insert(0, Message(role="system", content="Be brief."))
    row.ground_truth = {"answer": [2]}
    row.tools = [{"type": "function", "function": {"name": "f"}}]
    row.input_metadata.completion_params = {"model": "m"}
    row.execution_metadata.extra["run_index"] = 3
    first, second = views_of(row)
    assert first.messages == row.messages
    assert [m.content for m in second.messages] == ["Be brief.", "1+1?", "two"]
    for index, (view, reason) in enumerate(zip((first, second), ("stop", "length"), strict=True)):
        extra = view.execution_metadata.extra
        assert (extra["completion_index"], extra["finish_reason"]) == (index, reason)
        assert view.execution_metadata.finish_reason == reason
        assert extra["run_index"] == 3
        assert not set(extra).intersection([*ARRAY_KEYS, "rewards", "rft_schema"])
        assert view.ground_truth == row.ground_truth
        assert view.tools == row.tools
        assert view.input_metadata == row.input_metadata
        assert view.execution_metadata.rollout_id == row.execution_metadata.rollout_id


def test_a_column_of_the_dataset_reaches_the_evaluator():
    row = answered("x")
    row.difficulty = "hard"
    assert views_of(row)[0].difficulty == "hard"


def test_a_view_has_no_result_of_an_earlier_evaluation():
    row = answered("x")
    row.evaluation_result = EvaluateResult(score=1.0)
    seen = []

    @score_each_completion
    def evaluator(row: EvaluationRow) -> EvaluationRow:
        seen.append(row.evaluation_result)
        return row

    evaluator(row)
    assert seen == [None]
    assert rewards(row) == [None]


@pytest.mark.parametrize(("split", "content"), [(True, "2"), (False, "<think>hm</think>2")])
def test_reasoning_is_where_the_rollout_put_it_in_the_row_s_own_message(split, content):
    row = answered("<think>hm</think>2", "<think>well</think>2", split_reasoning=split)
    first, second = views_of(row)
    assert first.messages[-1] == row.messages[-1]
    assert first.messages[-1].content == content
    assert second.messages[-1].reasoning_content == ("well" if split else None)


def test_an_evaluator_may_change_all_that_it_is_given():
    row = answered("a", "b")
    row.ground_truth = {"answer": [2]}
    row.tools = [{"function": {"name": "f"}}]
    row.input_metadata.dataset_info = {"tags": ["t"]}
    row.execution_metadata.extra["run_index"] = 3
    pristine = row.model_copy(deep=True)
    seen = []

    @score_each_completion
    def vandal(row: EvaluationRow) -> EvaluationRow:
        seen.append(row.model_dump(exclude={"execution_metadata"}))
        row.messages[0].content = "changed"
        row.messages.clear()
        row.ground_truth["answer"].append(3)
        row.tools[0]["function"]["name"] = "g"
        row.input_metadata.dataset_info["tags"].append("u")
        row.execution_metadata.extra["sampling"]["stop"].append("x")
        row.execution_metadata.extra.clear()
        row.execution_metadata.rollout_id = "changed"
        row.rollout_status.message = "changed"
        return give(row, 1.0)

    vandal(row)
    for view, text in zip(seen, ("a", "b"), strict=True):
        expected = pristine.model_dump(exclude={"execution_metadata"})
        expected["messages"][-1]["content"] = text
        assert view == expected
    for name in ("rewards", "completion_results"):
        del row.execution_metadata.extra[name]
    row.evaluation_result = None
    assert row == pristine


def test_a_row_whose_last_message_is_not_its_first_completion_is_refused():
    row = answered("a", "b")
    row.input_metadata.row_id = "r1"
    row.messages.append(Message(role="user", content="and then?"))
    with pytest.raises(RecordError, match=r"row r1: .*user 'and then\?' against assistant 'a'"):
        is_right(row)
    assert row.evaluation_result is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rft_schema", 2, "rft_schema is 2, this version reads 1"),
        ("completions_text", ["a"], "1 completions_text but 2 finish_reasons"),
        ("completions_text", None, "invalid rollout record: .*completions_text"),
    ],
)
def test_a_record_that_cannot_be_read_is_an_error_that_names_the_row(key, value, message):
    row = answered("a", "b")
    row.input_metadata.row_id = "r1"
    row.execution_metadata.extra[key] = value
    with pytest.raises(RecordError, match=f"row r1: {message}"):
        is_right(row)


def test_a_row_without_a_record_goes_through_the_evaluator_once_as_it_is():
    row = asked()
    seen = []

    @score_each_completion
    def evaluator(row: EvaluationRow) -> EvaluationRow:
        seen.append(row)
        return give(row, 0.0)

    assert evaluator(row) is row
    assert seen == [row]
    assert seen[0] is row
    assert row.execution_metadata.extra is None


def test_on_a_row_without_a_record_an_evaluator_s_error_is_eval_protocol_s_to_handle():
    with pytest.raises(ZeroDivisionError):
        score_each_completion(raising_evaluator)(asked())


def raising_evaluator(row: EvaluationRow) -> EvaluationRow:
    return raises(row)


def test_completions_of_an_earlier_rollout_are_not_scored_for_one_that_failed():
    row = answered("2")
    row.rollout_status = Status.rollout_error("server gone")
    row = is_right(row)
    assert "rewards" not in row.execution_metadata.extra
    assert row.evaluation_result.metrics == {}
