"""`@score_each_completion` under the real `@evaluation_test`. Rollouts are canned: the scoring is
what is looked at. Annotations are strings in this file, which Eval Protocol alone refuses."""

from __future__ import annotations

import asyncio
import runpy

import pytest
from eval_protocol.models import EvaluationRow, Status
from eval_protocol.pytest import evaluation_test

from eval_protocol_rft.record import RolloutRecord
from eval_protocol_rft.scoring._evaluator import EvaluatorError
from eval_protocol_rft.scoring._scorer import score_each_completion
from tests.scored_rows import Canned, Rows, answered, asked, give, rewards, said

ANSWERS = {"1+1?": ("2", "3", "2"), "2+2?": ("4", "5", "6"), "3+3?": ("7", "oops", "6")}
RIGHT = {"1+1?": 2, "2+2?": 4, "3+3?": 6}
EXPECTED = {"1+1?": [1.0, 0.0, 1.0], "2+2?": [1.0, 0.0, 0.0], "3+3?": [0.0, None, 1.0]}


def judge(row: EvaluationRow) -> EvaluationRow:
    return give(row, float(int(said(row)) == RIGHT[row.messages[0].content]))


async def judge_async(row: EvaluationRow) -> EvaluationRow:
    await asyncio.sleep(0)
    return judge(row)


def judge_rows(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    for row in rows:
        if said(row).isdigit():
            judge(row)
    return rows[::-1]


async def judge_rows_async(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    await asyncio.sleep(0)
    return judge_rows(rows)


def evaluate(evaluator, *, answers=ANSWERS, mode="pointwise", **options) -> list[EvaluationRow]:
    """Run the evaluator as an evaluation test, each case in a loop of its own as pytest would, and
    return the rows as they were logged last."""
    logger = Rows()
    test = evaluation_test(
        input_rows=[[asked(question) for question in answers]],
        completion_params=[{"model": "m"}],
        rollout_processor=Canned(answers),
        mode=mode,
        logger=logger,
        **options,
    )(evaluator)
    (cases,) = (mark.kwargs for mark in test.pytestmark if mark.name == "parametrize")
    for case in cases["argvalues"]:
        values = case.values if hasattr(case, "values") else case
        values = values if isinstance(values, tuple | list) else (values,)
        asyncio.run(test(**dict(zip(cases["argnames"], values, strict=True))))
    return logger.read()


@pytest.mark.parametrize("num_runs", [1, 3])
@pytest.mark.parametrize(
    ("mode", "evaluator", "scheduler"),
    [
        ("pointwise", judge, "default"),
        ("pointwise", judge, "priority"),
        ("pointwise", judge_async, "default"),
        ("pointwise", judge_async, "priority"),
        ("groupwise", judge_rows, "default"),
        ("groupwise", judge_rows, "priority"),
        ("groupwise", judge_rows_async, "default"),
        ("groupwise", judge_rows_async, "priority"),
        # Under the priority scheduler, mode="all" never calls any evaluator.
        ("all", judge_rows, "default"),
        ("all", judge_rows_async, "default"),
    ],
)
def test_every_row_comes_out_finished_with_a_reward_per_completion(
    mode, evaluator, scheduler, num_runs, monkeypatch
):
    if scheduler == "priority":
        monkeypatch.setenv("EP_USE_PRIORITY_SCHEDULER", "1")
    rows = evaluate(score_each_completion(evaluator), mode=mode, num_runs=num_runs)
    assert len(rows) == len(ANSWERS) * num_runs
    for row in rows:
        question = row.messages[0].content
        assert rewards(row) == EXPECTED[question]
        assert row.rollout_status.is_finished()
        assert [m.role for m in row.messages] == ["user", "assistant"]
        assert said(row) == ANSWERS[question][0]
        scored = [reward for reward in EXPECTED[question] if reward is not None]
        assert row.evaluation_result.score == pytest.approx(sum(scored) / len(scored))
        assert RolloutRecord.from_extra(row.execution_metadata.extra).rewards == EXPECTED[question]


@pytest.mark.parametrize("scheduler", ["0", "1"])
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("mode", ["pointwise", "groupwise", "all"])
def test_a_failed_rollout_is_not_judged_and_says_so(mode, is_async, scheduler, monkeypatch):
    monkeypatch.setenv("EP_USE_PRIORITY_SCHEDULER", scheduler)
    seen = []

    def one(row: EvaluationRow) -> EvaluationRow:
        seen.append(row.messages[0].content)
        return give(row, 1.0)

    async def one_async(row: EvaluationRow) -> EvaluationRow:
        return one(row)

    def many(rows: list[EvaluationRow]) -> list[EvaluationRow]:
        return [one(row) for row in rows]

    async def many_async(rows: list[EvaluationRow]) -> list[EvaluationRow]:
        return many(rows)

    pointwise = one_async if is_async else one
    evaluator = pointwise if mode == "pointwise" else many_async if is_async else many
    answers = {"1+1?": ("2", "3"), "2+2?": None, "3+3?": None}
    rows = evaluate(score_each_completion(evaluator), answers=answers, mode=mode)
    if mode == "all" and scheduler == "1":
        return  # Eval Protocol evaluates nothing there
    assert seen == ["1+1?", "1+1?"]
    assert len(rows) == 3
    good, *failed = sorted(rows, key=lambda row: row.rollout_status.is_error())
    assert rewards(good) == [1.0, 1.0]
    for row in failed:
        assert not row.evaluation_result.is_score_valid
        reason = "not judged, because the rollout failed: no completion survived"
        assert row.evaluation_result.reason == reason
        assert "rewards" not in (row.execution_metadata.extra or {})


def test_an_evaluator_is_not_called_where_all_rollouts_failed_and_no_threshold_is_passed():
    @score_each_completion
    def evaluator(rows: list[EvaluationRow]) -> list[EvaluationRow]:
        raise AssertionError("there is nothing to judge")

    answers = {"1+1?": None, "2+2?": None}
    rows = evaluate(evaluator, answers=answers, mode="groupwise")
    assert [row.evaluation_result.is_score_valid for row in rows] == [False, False]
    with pytest.raises(AssertionError, match="below threshold"):
        evaluate(evaluator, answers=answers, mode="groupwise", passed_threshold=0.5)


@pytest.mark.parametrize("code", [Status.Code.UNAVAILABLE, Status.Code.RESPONSE_QUALITY_ERROR])
def test_every_error_status_is_a_failed_rollout(code):
    row = answered("2")
    row.rollout_status = Status(code=code, message="gone")
    score_each_completion(judge)(row)
    assert row.evaluation_result.reason == "not judged, because the rollout failed: gone"


@pytest.mark.parametrize("code", [Status.Code.OK, Status.Code.FINISHED, Status.Code.RUNNING])
def test_other_statuses_are_none(code):
    row = answered("2")
    row.rollout_status = Status(code=code, message="")
    assert rewards(score_each_completion(judge)(row)) == [1.0]


def test_evaluation_kwargs_reach_every_call_also_by_way_of_kwargs():
    @score_each_completion
    def evaluator(row: EvaluationRow, scale: float, **more: float) -> EvaluationRow:
        return give(row, scale * len(said(row)) + more.get("plus", 0.0))

    sets = [{"scale": 1.0}, {"scale": 10.0, "plus": 0.5}]
    rows = evaluate(evaluator, answers={"?": ("a", "bb")}, evaluation_test_kwargs=sets)
    assert sorted(rewards(row) for row in rows) == [[1.0, 2.0], [10.5, 20.5]]


def test_the_aggregated_score_of_the_test_is_that_of_the_rows():
    rows = evaluate(score_each_completion(aggregation="max")(judge))
    assert [row.evaluation_result.agg_score for row in rows] == [1.0] * 3
    with pytest.raises(AssertionError, match="below threshold"):
        evaluate(score_each_completion(judge), passed_threshold=0.6)


def decorated(evaluator, mode="pointwise"):
    return evaluation_test(
        input_rows=[[asked()]],
        completion_params=[{"model": "m"}],
        rollout_processor=Canned({}),
        mode=mode,
    )(score_each_completion(evaluator))


@pytest.mark.parametrize("evaluator", [judge, judge_async])
async def test_a_direct_call_scores_a_row(evaluator):
    row = answered("2", "x")
    assert await decorated(evaluator)(row) is row
    assert rewards(row) == [1.0, None]


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("evaluator", [judge_rows, judge_rows_async])
async def test_a_direct_call_scores_rows(evaluator, by_keyword):
    test, rows = decorated(evaluator, mode="groupwise"), [answered("2", "3"), answered("x")]
    assert await (test(rows=rows) if by_keyword else test(rows)) == rows
    assert [rewards(row) for row in rows] == [[1.0, 0.0], [None]]


def test_the_function_that_eval_protocol_keeps_can_be_called_by_itself():
    assert rewards(decorated(judge)._origin_func(row=answered("2"))) == [1.0]


def test_string_annotations_that_eval_protocol_alone_refuses_are_resolved():
    with pytest.raises(ValueError, match="must be of type EvaluationRow"):
        evaluation_test(input_rows=[[asked()]], rollout_processor=Canned({}))(judge)
    decorated(judge)


def test_an_annotation_that_cannot_be_resolved_is_named(tmp_path):
    file = tmp_path / "elsewhere.py"
    file.write_text(
        "from __future__ import annotations\n"
        "def evaluator(row: EvaluationRow) -> EvaluationRow: ...\n"
    )
    with pytest.raises(EvaluatorError, match=r"'EvaluationRow' is not defined.*TYPE_CHECKING"):
        score_each_completion(runpy.run_path(str(file))["evaluator"])


def test_the_decorators_in_the_wrong_order_are_refused():
    test = evaluation_test(
        input_rows=[[asked()]], completion_params=[{"model": "m"}], rollout_processor=Canned({})
    )(score_each_completion(judge))
    with pytest.raises(EvaluatorError, match="below @evaluation_test"):
        score_each_completion(test)
