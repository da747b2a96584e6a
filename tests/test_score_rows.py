"""Scoring rows again later, outside of a test."""

import asyncio
import itertools
import threading

import pytest
from eval_protocol.models import EvaluationRow
from eval_protocol.pytest import evaluation_test

from eval_protocol_rft.record import RecordError
from eval_protocol_rft.scoring._evaluator import EvaluatorError
from eval_protocol_rft.scoring._scorer import ascore_rows, score_each_completion, score_rows
from tests.scored_rows import Canned, answered, asked, give, results, rewards, said


def judge(row: EvaluationRow, right: str = "2") -> EvaluationRow:
    return give(row, float(said(row) == right))


async def judge_async(row: EvaluationRow, right: str = "2") -> EvaluationRow:
    await asyncio.sleep(0)
    return judge(row, right)


def rank(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    """The place of a completion among all that were handed over with it."""
    return [give(row, float(i)) for i, row in enumerate(rows)][::-1]


async def rank_async(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    return rank(rows)


def under_evaluation_test(evaluator, **options):
    return evaluation_test(
        input_rows=[[asked()]],
        completion_params=[{"model": "m"}],
        rollout_processor=Canned({}),
        **options,
    )(evaluator)


@pytest.mark.parametrize("evaluator", [judge, judge_async])
@pytest.mark.parametrize(
    "form",
    [
        lambda f: f,
        score_each_completion,
        under_evaluation_test,
        lambda f: under_evaluation_test(score_each_completion(f)),
    ],
    ids=["plain", "decorated", "evaluation_test", "decorated evaluation_test"],
)
def test_any_form_of_an_evaluator_scores_each_completion_once(form, evaluator):
    rows = [answered("2", "3"), answered("4")]
    assert score_rows(rows, form(evaluator)) == rows
    assert [rewards(row) for row in rows] == [[1.0, 0.0], [0.0]]


def test_earlier_rewards_are_replaced_and_hidden_from_the_evaluator():
    row = answered("2", "3")
    score_rows([row], judge)

    def nosy(row: EvaluationRow) -> EvaluationRow:
        assert row.evaluation_result is None
        assert "rewards" not in row.execution_metadata.extra
        assert "completion_results" not in row.execution_metadata.extra
        return give(row, 0.25, reason="again")

    score_rows([row], nosy)
    assert rewards(row) == [0.25, 0.25]
    assert [result["reason"] for result in results(row)] == ["again", "again"]
    assert row.evaluation_result.score == 0.25


def test_evaluation_kwargs_are_passed_on():
    (row,) = score_rows([answered("2", "3")], judge, evaluation_test_kwargs={"right": "3"})
    assert rewards(row) == [0.0, 1.0]


def test_an_evaluation_test_brings_its_only_set_of_kwargs():
    test = under_evaluation_test(judge, evaluation_test_kwargs=[{"right": "3"}])
    assert rewards(score_rows([answered("2", "3")], test)[0]) == [0.0, 1.0]
    given = score_rows([answered("2", "3")], test, evaluation_test_kwargs={"right": "2"})
    assert rewards(given[0]) == [1.0, 0.0]


def test_with_several_sets_of_kwargs_one_has_to_be_chosen():
    test = under_evaluation_test(judge, evaluation_test_kwargs=[{"right": "2"}, {"right": "3"}])
    with pytest.raises(EvaluatorError, match="2 sets of evaluation_test_kwargs"):
        score_rows([answered("2")], test)


def test_a_decorated_evaluator_brings_its_options_and_the_call_overrides_them():
    decorated = score_each_completion(aggregation="max", pass_threshold=0.5)(judge)
    for evaluator in (decorated, under_evaluation_test(decorated)):
        (row,) = score_rows([answered("2", "3")], evaluator)
        assert row.evaluation_result.score == 1.0
        assert "reached 0.5" in row.evaluation_result.metrics["pass@1"].reason
        (row,) = score_rows([answered("2", "3")], evaluator, aggregation="mean")
        assert row.evaluation_result.score == 0.5
        assert "reached 0.5" in row.evaluation_result.metrics["pass@1"].reason


def in_groups():
    """Two prompt groups, rows interleaved; the second row_id repeats in another experiment."""
    rows = [answered("a", "b"), answered("c"), answered("d"), answered("e")]
    ids = [("x", "r1"), ("x", "r2"), ("x", "r1"), ("y", "r1")]
    for row, (experiment, row_id) in zip(rows, ids, strict=True):
        row.execution_metadata.experiment_id = experiment
        row.input_metadata.row_id = row_id
    return rows


@pytest.mark.parametrize("evaluator", [rank, rank_async])
def test_groupwise_calls_once_per_prompt_group_and_rows_keep_their_order(evaluator):
    rows = in_groups()
    assert score_rows(rows, evaluator, mode="groupwise") == rows
    assert [rewards(row) for row in rows] == [[0.0, 1.0], [0.0], [2.0], [0.0]]


def test_rows_without_a_row_id_are_groups_of_their_own():
    rows = score_rows([answered("a"), answered("b")], rank, mode="groupwise")
    assert [rewards(row) for row in rows] == [[0.0], [0.0]]


@pytest.mark.parametrize("evaluator", [rank, rank_async])
def test_all_calls_once(evaluator):
    rows = score_rows(in_groups(), evaluator, mode="all")
    assert [rewards(row) for row in rows] == [[0.0, 1.0], [2.0], [3.0], [4.0]]


@pytest.mark.parametrize(("mode", "last"), [("groupwise", 0.0), ("all", 4.0)])
def test_an_evaluation_test_brings_its_mode(mode, last):
    rows = score_rows(in_groups(), under_evaluation_test(rank, mode=mode))
    assert rewards(rows[-1]) == [last]


def test_an_evaluator_of_rows_by_itself_needs_a_mode_and_a_mode_must_fit():
    with pytest.raises(EvaluatorError, match="needs mode='groupwise' or mode='all'"):
        score_rows([answered("a")], rank)
    with pytest.raises(EvaluatorError, match="mode 'all' does not fit an evaluator of `row`"):
        score_rows([answered("a")], judge, mode="all")
    with pytest.raises(EvaluatorError, match="mode 'pointwise' does not fit"):
        score_rows([answered("a")], rank, mode="pointwise")


@pytest.mark.parametrize("evaluator", [judge, judge_async])
async def test_inside_a_running_loop_the_async_form_works_and_the_sync_one_says_so(evaluator):
    row = answered("2", "3")
    with pytest.raises(RuntimeError, match="await ascore_rows"):
        score_rows([row], evaluator)
    assert await ascore_rows([row], evaluator) == [row]
    assert rewards(row) == [1.0, 0.0]


@pytest.mark.parametrize("make_row", [lambda: answered("a", "b", "c"), asked])
async def test_max_concurrency_bounds_the_calls_in_flight_with_and_without_completions(make_row):
    now, most = 0, 0

    async def slow(row: EvaluationRow) -> EvaluationRow:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return give(row, 1.0)

    rows = await ascore_rows([make_row() for _ in range(9)], slow, max_concurrency=4)
    assert most == 4
    assert [row.evaluation_result.score for row in rows] == [1.0] * 9


def test_a_row_without_a_record_is_replaced_by_what_the_evaluator_returned_for_it():
    substitute = asked("other")

    def evaluator(row: EvaluationRow) -> EvaluationRow:
        return substitute if said(row) == "1+1?" else give(row, 1.0)

    first, errored, last = answered("a"), asked(), answered("b")
    scored = score_rows([first, errored, last], evaluator)
    assert scored[0] is first
    assert scored[1] is substitute
    assert scored[2] is last


def test_an_unreadable_record_stops_the_scoring_and_names_the_row():
    row = answered("a")
    row.input_metadata.row_id = "r9"
    row.execution_metadata.extra["finish_reasons"] = "stop"
    for evaluator in (judge, judge_async):
        with pytest.raises(RecordError, match="row r9"):
            score_rows([row], evaluator)


def test_no_rows_are_no_work():
    assert score_rows([], judge) == []
    assert score_rows([], judge_async) == []
    assert score_rows([], rank, mode="all") == []


async def test_the_loop_turns_between_two_calls_of_a_sync_evaluator():
    """And they come in order, in the main thread, where `signal.alarm` works."""
    turns, calls = [], []

    def evaluator(row: EvaluationRow) -> float:
        assert threading.current_thread() is threading.main_thread()
        calls.append(len(turns))
        return 1.0

    async def other() -> None:
        for turn in range(100):
            turns.append(turn)
            await asyncio.sleep(0)

    beside = asyncio.ensure_future(other())
    await ascore_rows([answered("1", "2"), answered("3", "4")], evaluator)
    beside.cancel()
    assert len(calls) == 4
    assert all(before < after for before, after in itertools.pairwise(calls))
