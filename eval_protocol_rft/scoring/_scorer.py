"""Runs an evaluator once per completion and writes the outcome to the rows: under a decorator in a
test, or on rows again, outside of one (another evaluator, other options, a mended bug).

Invariant: a row whose rollout failed never reaches the evaluator: there is nothing to score but the
user's own words. A row without a rollout record reaches it as it is, once, and what the evaluator
then does is Eval Protocol's to handle. A row with one is changed when all its completions have been
scored, or not at all. Under `@score_each_completion`, the decorator between `@evaluation_test` and
the user's evaluator, Eval Protocol sees the user's function: its name, parameters, annotations,
source file and whether it is async. Rows that are scored again have the same outcome as under the
decorator, by the same code, and their earlier rewards are replaced.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast, overload

from eval_protocol.models import EvaluationRow

from eval_protocol_rft.scoring import _evaluator, _scored_rows
from eval_protocol_rft.scoring._evaluator import BoundCall, Evaluator, EvaluatorError, Mode
from eval_protocol_rft.scoring._results import Place, lay_out, read_result, sort_answers
from eval_protocol_rft.scoring._scored_rows import Aggregation, ScoringOptions

T = TypeVar("T")


_Plan = tuple[list[Any], Callable[[list[Any]], Any]]
"""What the evaluator is to be called with, one call each (none where there is nothing to score);
and what takes the outcomes in that order, writes to the rows, and returns what the caller gets."""


class Scorer:
    """An evaluator with options; called as the evaluator itself would be."""

    def __init__(self, evaluator: Evaluator, options: ScoringOptions) -> None:
        self.evaluator = evaluator
        self.options = options
        self._slots: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}

    def score(self, *args: Any, **kwargs: Any) -> Any:
        """Score with a sync evaluator: completions in order, on the calling thread, as Eval
        Protocol itself runs sync evaluators on its event loop.

        Returns:
            The row or list of rows given, changed in place. A row without a record is replaced by
            what the evaluator returned for it.
        """
        call = self.evaluator.bind(*args, **kwargs)
        plan = self._plan(call)
        if plan is None:
            return call(call.given)
        values, finish = plan
        return finish([call.attempt(value) for value in values])

    async def score_async(self, *args: Any, **kwargs: Any) -> Any:
        """Score with an async evaluator: the completions of a row concurrently; else as `score`,
        but the loop turns between two calls of a sync one. A thread of its own would let the loop
        turn during them, and take from evaluators what works in the main thread alone: the
        `signal.alarm` by which math graders end what takes too long, and without which some of
        them call every answer wrong."""
        call = self.evaluator.bind(*args, **kwargs)
        plan = self._plan(call)
        if plan is None:
            returned = call(call.given)
            return await returned if self.evaluator.is_async else returned
        values, finish = plan
        if self.evaluator.is_async:
            slots = self._slots_of_this_loop()
            return finish(await run_all([_attempt(call, value, slots) for value in values]))
        outcomes = []
        for value in values:
            outcomes.append(call.attempt(value))
            await asyncio.sleep(0)
        return finish(outcomes)

    def _plan(self, call: BoundCall) -> _Plan | None:
        """What to call and what to do with the outcomes; None where the evaluator is to be
        called on what it was given, because no row has a record or failed."""
        if self.evaluator.parameter == "row":
            row: EvaluationRow = call.given
            if _scored_rows.rollout_failed(row):
                return [], lambda _: _scored_rows.commit_failed_rollout(row)
            views_of_row = _scored_rows.completion_views(row)
            if views_of_row is None:
                return None
            return list(views_of_row), lambda outcomes: self._commit(row, outcomes)
        rows: list[EvaluationRow] = call.given
        _refuse_several_models(rows)
        views = [
            [] if _scored_rows.rollout_failed(row) else _scored_rows.completion_views(row)
            for row in rows
        ]
        if all(row_views is None for row_views in views):
            return None
        layout = lay_out(rows, views)
        calls = [list(layout.values())] if layout else []
        return calls, lambda outcomes: self._settle(rows, layout, outcomes[0] if outcomes else [])

    def _commit(self, row: EvaluationRow, outcomes: Sequence[Any]) -> EvaluationRow:
        _scored_rows.commit_scores(
            row, [read_result(outcome) for outcome in outcomes], self.options
        )
        return row

    def _settle(
        self, rows: Sequence[EvaluationRow], layout: Mapping[Place, EvaluationRow], returned: Any
    ) -> list[EvaluationRow]:
        """Write the outcome of one call to all its rows. If the call raised and had a row without
        a record in it, the error goes on to Eval Protocol once the other rows have been marked as
        unscored: nobody else can say what becomes of that row."""
        results, passed = sort_answers(layout, returned)
        settled: list[EvaluationRow] = []
        for i, row in enumerate(rows):
            if (i, None) in layout:
                settled.extend(passed[i])
            elif _scored_rows.rollout_failed(row):
                settled.append(_scored_rows.commit_failed_rollout(row))
            else:
                _scored_rows.commit_scores(row, results.get(i, []), self.options)
                settled.append(row)
        if isinstance(returned, _evaluator.CallFailed) and passed:
            raise returned.error
        return settled

    def _slots_of_this_loop(self) -> asyncio.Semaphore:
        """One semaphore per event loop: Eval Protocol runs each test case in a loop of its own."""
        loop = asyncio.get_running_loop()
        if loop not in self._slots:
            self._slots = {known: s for known, s in self._slots.items() if not known.is_closed()}
            self._slots[loop] = asyncio.Semaphore(self.options.max_concurrency)
        return self._slots[loop]


def _refuse_several_models(rows: Sequence[EvaluationRow]) -> None:
    """A group of Eval Protocol has one row per set of completion parameters, and its evaluators
    take `rows[1]` for the second model's. With n completions of each it would be another one of
    the first model's, and the scores would compare the wrong answers."""
    if len({row.input_metadata.row_id for row in rows}) != 1:
        return  # not a group but a whole data set
    sets: list[Any] = []
    for row in rows:
        if row.input_metadata.completion_params not in sets:
            sets.append(row.input_metadata.completion_params)
    counts = [
        len((row.execution_metadata.extra or {}).get("completions_text") or ()) for row in rows
    ]
    if len(sets) > 1 and max(counts) > 1:
        raise EvaluatorError(several_models_problem(len(sets), max(counts)))


def several_models_problem(sets: int, n: int) -> str:
    """What to say of a groupwise evaluator of n completions for each of several models."""
    return (
        f"@score_each_completion with {sets} sets of completion_params and n={n} in a group: the "
        "evaluator would get all completions in one list, where rows[1] is the first model's "
        "second one and not the second model's. Use n=1 in each set, one set per evaluation test, "
        'mode="pointwise", or leave @score_each_completion away: a group then has one row per model'
    )


async def _attempt(call: BoundCall, value: Any, slots: asyncio.Semaphore) -> Any:
    async with slots:
        return await call.attempt_async(value)


async def run_all(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order. When one raises or we are cancelled, the others are cancelled and awaited
    first, so that nothing runs on behind the caller's back."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


F = TypeVar("F", bound=Callable[..., Any])

OPTIONS_ATTRIBUTE = "__scoring_options__"
"""Where a decorated evaluator keeps its options, for scoring its rows again later."""


@overload
def score_each_completion(evaluator: F, /) -> F: ...
@overload
def score_each_completion(
    *,
    aggregation: Aggregation = "mean",
    pass_threshold: float = 1.0,
    max_concurrency: int = 96,
) -> Callable[[F], F]: ...
def score_each_completion(
    evaluator: Callable[..., Any] | None = None,
    /,
    *,
    aggregation: Aggregation = "mean",
    pass_threshold: float = 1.0,
    max_concurrency: int = 96,
) -> Any:
    """Run an evaluator once per completion of each row instead of once per row.

    ```python
    @evaluation_test(..., rollout_processor=FireworksTrainingRolloutProcessor())
    @score_each_completion
    def test_answer(row: EvaluationRow) -> EvaluationRow: ...
    ```

    The evaluator stays as it is. With `row` it is called per completion, with `rows` (groupwise,
    all) once with all completions of all rows in one flat list. It sees copies of the row that
    end in one completion each, with `completion_index` and `finish_reason` in
    `execution_metadata.extra` and without token arrays; what it changes there, other than
    `evaluation_result`, is dropped.

    The row gets `extra["rewards"]` (score or None per completion), `extra["completion_results"]`
    (score, reason, metrics, error) and an `evaluation_result` that sums them up; its messages
    stay. A completion for which the evaluator raises (`pytest.skip` and `pytest.fail` too) or
    gives no valid, finite score has the reward None. The evaluator is not called on a row whose
    rollout failed: its `evaluation_result` is marked invalid and says why. Rows without a rollout
    record (of other processors) go through the evaluator once, as they are.

    Args:
        evaluator: the function below the decorator, when it is used without options.
        aggregation: how the row's own score comes from its valid scores.
        pass_threshold: score from which on a completion counts as passed in pass@k.
        max_concurrency: calls of an async evaluator in flight per event loop. Sync evaluators run
            one completion after the other on the loop, as in Eval Protocol itself.

    Raises:
        EvaluatorError: the function cannot be an evaluator, or already is an evaluation test.
        ValueError: an option is out of range.
    """
    options = ScoringOptions(
        aggregation=aggregation, pass_threshold=pass_threshold, max_concurrency=max_concurrency
    )
    if evaluator is None:
        return functools.partial(_decorate, options=options)
    return _decorate(evaluator, options=options)


def _decorate(function: F, *, options: ScoringOptions) -> F:
    if _evaluator.is_evaluation_test(function):
        raise EvaluatorError(
            f"{function.__name__} is already an evaluation test: put @score_each_completion "
            "below @evaluation_test, next to the function"
        )
    scorer = Scorer(Evaluator.of(function), options)
    wrapper = functools.wraps(function)(_wrapper(scorer))
    wrapper.__dict__[OPTIONS_ATTRIBUTE] = options
    wrapper.__dict__["__signature__"] = scorer.evaluator.signature
    return cast("F", wrapper)


def _wrapper(scorer: Scorer) -> Callable[..., Any]:
    """A function that runs `scorer`, async where its evaluator is."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return scorer.score(*args, **kwargs)

    async def run_async(*args: Any, **kwargs: Any) -> Any:
        return await scorer.score_async(*args, **kwargs)

    wrapper = run_async if scorer.evaluator.is_async else run
    # `ep upload` asks inspect.getsourcefile which file to send, and that looks at the code object,
    # not at __wrapped__: it would send this file, which the evaluator is not in.
    code = scorer.evaluator.code
    wrapper.__code__ = wrapper.__code__.replace(
        co_filename=code.co_filename, co_firstlineno=code.co_firstlineno
    )
    return wrapper


def score_rows(
    rows: Sequence[EvaluationRow],
    evaluator: Callable[..., Any],
    *,
    mode: Mode | None = None,
    evaluation_test_kwargs: Mapping[str, Any] | None = None,
    aggregation: Aggregation | None = None,
    pass_threshold: float | None = None,
    max_concurrency: int | None = None,
) -> list[EvaluationRow]:
    """Score every completion of `rows` with `evaluator`, as `score_each_completion` does.

    Args:
        rows: changed in place.
        evaluator: a function, sync or async, plain or decorated. One under `@evaluation_test`
            brings its mode and, if it has a single set of them, its keyword arguments; one under
            `@score_each_completion` brings its options. No completion is scored twice.
        mode: `pointwise` for an evaluator of one `row`. One of `rows` is called once per prompt
            group (`groupwise`) or once for all rows (`all`). A prompt group has one experiment_id
            and row_id: all runs and all completion parameters of a dataset row together.
        evaluation_test_kwargs: further arguments of the evaluator.
        aggregation, pass_threshold, max_concurrency: as in `score_each_completion`; None keeps
            what the evaluator was decorated with, or the default.

    Returns:
        The rows in their order; a row without a rollout record is replaced by what the evaluator
        returned for it, and one whose rollout failed is marked invalid.

    Raises:
        RuntimeError: an event loop is running here; await `ascore_rows` instead.
        EvaluatorError: the evaluator does not fit the mode, or needs the mode or arguments named.
        RecordError: a row's rollout record is unreadable.
    """
    _refuse_running_loop()
    options = _chosen(
        aggregation=aggregation, pass_threshold=pass_threshold, max_concurrency=max_concurrency
    )
    scorer, calls = _planned(rows, evaluator, mode, evaluation_test_kwargs, options)
    if scorer.evaluator.is_async:
        return asyncio.run(_score_async(rows, scorer, calls))
    return _in_order(rows, scorer, [scorer.score(**call) for call in calls])


async def ascore_rows(
    rows: Sequence[EvaluationRow],
    evaluator: Callable[..., Any],
    *,
    mode: Mode | None = None,
    evaluation_test_kwargs: Mapping[str, Any] | None = None,
    aggregation: Aggregation | None = None,
    pass_threshold: float | None = None,
    max_concurrency: int | None = None,
) -> list[EvaluationRow]:
    """`score_rows` inside a running event loop; the evaluator may be sync or async.

    At most `max_concurrency` rows or groups are in work at once, and as many evaluator calls.
    """
    options = _chosen(
        aggregation=aggregation, pass_threshold=pass_threshold, max_concurrency=max_concurrency
    )
    return await _score_async(
        rows, *_planned(rows, evaluator, mode, evaluation_test_kwargs, options)
    )


def _chosen(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _planned(
    rows: Sequence[EvaluationRow],
    evaluator: Callable[..., Any],
    mode: Mode | None,
    kwargs: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> tuple[Scorer, list[dict[str, Any]]]:
    """What scores, and the arguments of the evaluator, call by call."""
    function = _evaluator.inner_evaluator(evaluator)
    mode = _evaluator.mode_of(evaluator, function, mode)
    base = getattr(function.function, OPTIONS_ATTRIBUTE, ScoringOptions())
    scorer = Scorer(function, replace(base, **options))
    kwargs = _evaluator.own_kwargs(evaluator) if kwargs is None else kwargs
    if mode == "pointwise":
        return scorer, [{"row": row, **kwargs} for row in rows]
    groups: dict[Any, list[EvaluationRow]] = {}
    for row in rows:
        groups.setdefault(_group(row) if mode == "groupwise" else None, []).append(row)
    return scorer, [{"rows": group, **kwargs} for group in groups.values()]


def _in_order(
    rows: Sequence[EvaluationRow], scorer: Scorer, answers: Sequence[Any]
) -> list[EvaluationRow]:
    """What the calls answered with, in the order of `rows`; in a group, a row that the evaluator
    made anew has no place among them and comes last."""
    if scorer.evaluator.parameter == "row":
        return list(answers)
    position = {id(row): i for i, row in enumerate(rows)}
    flat = [row for group in answers for row in group]
    return sorted(flat, key=lambda row: position.get(id(row), len(rows)))


def _group(row: EvaluationRow) -> tuple[Any, ...]:
    """Key of the row's prompt group. A row without a row_id is a group of its own."""
    row_id = row.input_metadata.row_id
    return (id(row),) if row_id is None else (row.execution_metadata.experiment_id, row_id)


async def _score_async(
    rows: Sequence[EvaluationRow], scorer: Scorer, calls: Sequence[Mapping[str, Any]]
) -> list[EvaluationRow]:
    answers: list[Any] = [None] * len(calls)
    waiting = iter(enumerate(calls))

    async def work() -> None:
        for i, call in waiting:
            answers[i] = await scorer.score_async(**call)
            await asyncio.sleep(0)

    # Few workers rather than a task per row: views are made when a row's turn comes. A sync
    # evaluator sees one row after the other.
    workers = scorer.options.max_concurrency if scorer.evaluator.is_async else 1
    await run_all([work() for _ in range(min(len(calls), workers))])
    return _in_order(rows, scorer, answers)


def _refuse_running_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError(
        "score_rows cannot run inside a running event loop (a notebook, an async test): "
        "use `await ascore_rows(...)`"
    )
