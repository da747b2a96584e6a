"""Evaluators of `rows` under `@score_each_completion`: one call, all completions, and back."""

from collections import Counter

import pytest
from eval_protocol.models import EvaluationRow
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.scoring._evaluator import EvaluatorError
from eval_protocol_rft.scoring._scorer import score_each_completion
from tests.scored_rows import answered, asked, give, results, rewards, said


def raises(row):
    raise ZeroDivisionError("no luck")


def test_rows_evaluators_get_all_completions_of_all_rows_flat_in_one_call():
    calls = []

    @score_each_completion
    def rank(rows: list[EvaluationRow]) -> list[EvaluationRow]:
        calls.append([said(row) for row in rows])
        return [give(row, float(i)) for i, row in enumerate(rows)]

    group = [answered("a", "b"), answered("c", "d", "e")]
    assert rank(group) == group
    assert calls == [["a", "b", "c", "d", "e"]]
    assert [rewards(row) for row in group] == [[0.0, 1.0], [2.0, 3.0, 4.0]]


@pytest.mark.parametrize("copied", [False, True])
@given(order=st.permutations(range(5)))
def test_results_find_their_completion_in_any_order_copied_or_not(copied, order):
    @score_each_completion
    def shuffling(rows: list[EvaluationRow]) -> list[EvaluationRow]:
        given_back = [give(rows[i], float(said(rows[i]))) for i in order]
        return [row.model_copy(deep=True) for row in given_back] if copied else given_back

    group = [answered("0.0", "0.1"), answered("0.2", "0.3", "0.4")]
    shuffling(group)
    assert [rewards(row) for row in group] == [[0.0, 0.1], [0.2, 0.3, 0.4]]


def test_a_missing_and_a_doubled_result_are_none_and_name_their_completion():
    @score_each_completion
    def careless(rows: list[EvaluationRow]) -> list[EvaluationRow]:
        for row in rows:
            give(row, 1.0)
        return [rows[0], rows[2], rows[2], asked()]

    row = answered("a", "b", "c")
    careless([row])
    rollout = row.execution_metadata.rollout_id
    assert rewards(row) == [1.0, None, None]
    missing, doubled = (result["error"] for result in results(row)[1:])
    assert f"no row for completion 1 of rollout {rollout} (1 of the rows" in missing
    assert f"2 rows for completion 2 of rollout {rollout}" in doubled


def test_rows_with_one_rollout_id_between_them_are_told_apart_by_what_they_are():
    @score_each_completion
    def reverse(rows: list[EvaluationRow]) -> list[EvaluationRow]:
        return [give(row, float(said(row))) for row in reversed(rows)]

    @score_each_completion
    def copy_of_the_last(rows: list[EvaluationRow]) -> list[EvaluationRow]:
        return [give(rows[-1].model_copy(deep=True), 1.0)]

    group = [answered("1"), answered("2")]
    for row in group:
        row.execution_metadata.rollout_id = "same"
    assert [rewards(row) for row in reverse(group)] == [[1.0], [2.0]]
    # The copy could be of either: neither gets the score.
    assert [rewards(row) for row in copy_of_the_last(group)] == [[None], [None]]


def test_when_the_one_call_raises_every_completion_in_it_lacks_a_score():
    @score_each_completion
    def broken(rows: list[EvaluationRow]) -> list[EvaluationRow]:
        return raises(rows)

    group = broken([answered("a", "b"), answered("c")])
    assert [rewards(row) for row in group] == [[None, None], [None]]
    errors = Counter(result["error"] for row in group for result in results(row))
    assert len(errors) == 1
    assert next(iter(errors)).startswith("ZeroDivisionError: no luck")


@pytest.mark.parametrize("answer", [None, (), {}])
def test_when_the_call_returns_no_list_no_completion_has_a_score(answer):
    @score_each_completion
    def wrong(rows: list[EvaluationRow]) -> list[EvaluationRow]:
        return answer

    row = answered("a")
    wrong([row])
    assert rewards(row) == [None]
    assert "not a list of EvaluationRow" in results(row)[0]["error"]


def test_a_row_without_a_record_is_in_the_same_call_and_comes_back_as_the_evaluator_left_it():
    @score_each_completion
    def evaluator(rows: list[EvaluationRow]) -> list[EvaluationRow]:
        assert [said(row) for row in rows] == ["a", "b", "1+1?", "c"]
        return [give(row, 0.25) for row in reversed(rows)]

    first, errored, last = answered("a", "b"), asked(), answered("c")
    assert evaluator([first, errored, last]) == [first, errored, last]
    assert errored.evaluation_result.score == 0.25
    assert errored.execution_metadata.extra is None
    assert (rewards(first), rewards(last)) == ([0.25, 0.25], [0.25])


def test_when_a_call_with_such_a_row_raises_the_error_goes_on_and_no_completion_has_a_score():
    @score_each_completion
    def evaluator(rows: list[EvaluationRow]) -> list[EvaluationRow]:
        return raises(rows)

    row = answered("a")
    with pytest.raises(ZeroDivisionError):
        evaluator([row, asked()])
    assert rewards(row) == [None]
    assert not row.evaluation_result.is_score_valid


def test_rows_of_which_none_has_a_record_are_handed_over_as_they_are():
    @score_each_completion
    def evaluator(rows: list[EvaluationRow]) -> list[EvaluationRow]:
        return [give(row, 0.5) for row in rows][:1]

    group = [asked(), asked()]
    assert evaluator(group) == group[:1]


def test_a_group_of_several_completions_of_several_models_is_refused():
    rows = [answered("a", "b"), answered("c", "d")]
    for row, model in zip(rows, ("one", "two"), strict=True):
        row.input_metadata.row_id = "same"
        row.input_metadata.completion_params = {"model": model}
    evaluator = score_each_completion(first_gets_one)
    with pytest.raises(EvaluatorError, match=r"2 sets of completion_params and n=2.*rows\[1\]"):
        evaluator(rows)
    rows[1].input_metadata.row_id = "another row of a data set"
    evaluator(rows)


def first_gets_one(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    return [give(row, float(i == 0)) for i, row in enumerate(rows)]


@pytest.mark.parametrize("scores", [(0.0, 1.0), (-1.0, 2.0), (3.0, None), (None, None)])
def test_eval_protocols_page_takes_every_metric(scores):
    @score_each_completion
    def evaluator(rows: list[EvaluationRow]) -> list[EvaluationRow]:
        return [give(row, score) for row, score in zip(rows, scores, strict=True)]

    row = answered("a", "b", num_failed=1)
    evaluator([row])
    assert all(0.0 <= metric.score <= 1.0 for metric in row.evaluation_result.metrics.values())
    if scores == (-1.0, 2.0):
        assert ", from -1 to 2" in row.evaluation_result.reason
