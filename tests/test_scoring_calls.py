"""How `@score_each_completion` calls evaluators: concurrency, arguments, what it takes at all."""

import asyncio

import pytest
from eval_protocol.models import EvaluationRow

from eval_protocol_rft.scoring._evaluator import EvaluatorError
from eval_protocol_rft.scoring._scorer import score_each_completion
from tests.scored_rows import answered, give, rewards, said
from tests.waiting import PATIENCE


@score_each_completion
def is_right(row: EvaluationRow) -> EvaluationRow:
    return give(row, float(said(row) == "2"), reason=f"saw {said(row)}")


async def test_completions_of_a_row_are_judged_at_the_same_time():
    together = asyncio.Barrier(4)

    @score_each_completion
    async def evaluator(row: EvaluationRow) -> EvaluationRow:
        await together.wait()  # falls only when all four are here
        return give(row, float(said(row)))

    row = await asyncio.wait_for(evaluator(answered("0", "1", "2", "3")), PATIENCE)
    assert rewards(row) == [0.0, 1.0, 2.0, 3.0]


async def test_max_concurrency_bounds_the_calls_in_flight_over_all_rows():
    now, most = 0, 0

    @score_each_completion(max_concurrency=3)
    async def evaluator(row: EvaluationRow) -> EvaluationRow:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return give(row, 1.0)

    await asyncio.gather(*(evaluator(answered(*"abcd")) for _ in range(4)))
    assert most == 3


def test_one_decorated_evaluator_serves_one_event_loop_after_the_other():
    @score_each_completion(max_concurrency=1)
    async def evaluator(row: EvaluationRow) -> EvaluationRow:
        await asyncio.sleep(0)
        return give(row, 1.0)

    for _ in range(3):
        assert rewards(asyncio.run(evaluator(answered(*"abc")))) == [1.0, 1.0, 1.0]


async def test_cancelling_the_scoring_ends_every_call_and_leaves_the_row_as_it_was():
    running = set()
    started = asyncio.Event()

    @score_each_completion
    async def evaluator(row: EvaluationRow) -> EvaluationRow:
        running.add(said(row))
        if len(running) == 3:
            started.set()
        try:
            await asyncio.sleep(60)
        finally:
            running.discard(said(row))
        return give(row, 1.0)

    row = answered("a", "b", "c")
    task = asyncio.create_task(evaluator(row))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert running == set()
    assert "rewards" not in row.execution_metadata.extra
    assert row.evaluation_result is None


async def test_when_one_call_ends_the_run_its_siblings_are_ended_first():
    ended = []

    @score_each_completion
    async def evaluator(row: EvaluationRow) -> EvaluationRow:
        if said(row) == "b":
            pytest.exit("enough")
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(said(row))
        return give(row, 1.0)

    with pytest.raises(pytest.exit.Exception, match="enough"):
        await evaluator(answered("a", "b", "c"))
    assert sorted(ended) == ["a", "c"]


def test_arguments_travel_positionally_by_keyword_and_in_kwargs():
    @score_each_completion
    def evaluator(row: EvaluationRow, scale: float, **more: float) -> EvaluationRow:
        return give(row, scale * float(said(row)) + more["plus"])

    assert rewards(evaluator(answered("1"), 2, plus=1)) == [3.0]
    assert rewards(evaluator(row=answered("1"), scale=3, plus=1)) == [4.0]


def test_arguments_that_do_not_fit_are_an_error_and_not_a_missing_score():
    row = answered("a")
    with pytest.raises(TypeError, match="unexpected keyword argument 'typo'"):
        is_right(row, typo=1)
    assert "rewards" not in row.execution_metadata.extra


def test_decorating_twice_scores_once():
    calls = []

    @score_each_completion
    @score_each_completion
    def evaluator(row: EvaluationRow) -> EvaluationRow:
        calls.append(said(row))
        return give(row, float(len(calls)))

    assert rewards(evaluator(answered("a", "b"))) == [1.0, 2.0]
    assert calls == ["a", "b"]


def test_a_function_without_row_or_rows_or_with_both_is_refused():
    with pytest.raises(EvaluatorError, match=r"evaluator f must have one parameter .* neither"):

        @score_each_completion
        def f(sample): ...

    with pytest.raises(EvaluatorError, match="it has both"):

        @score_each_completion
        def g(row, rows): ...


@pytest.mark.parametrize(
    "options",
    [{"aggregation": "median"}, {"pass_threshold": float("nan")}, {"max_concurrency": 0}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        score_each_completion(**options)
