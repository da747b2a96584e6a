"""Scoring rows again, outside a test: another evaluator, other options, a mended bug.

Invariant: the same outcome as under the decorator, by the same code. Earlier rewards are replaced.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from eval_protocol.models import EvaluationRow

from eval_protocol_rft.scoring._evaluation_test import function_below, parameters_of, sets_of
from eval_protocol_rft.scoring._evaluator import Evaluator, EvaluatorError
from eval_protocol_rft.scoring._scorer import OPTIONS_ATTRIBUTE, Scorer, run_all
from eval_protocol_rft.scoring._summary import Aggregation, ScoringOptions

Mode = Literal["pointwise", "groupwise", "all"]


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
    job = _job(
        evaluator,
        mode,
        evaluation_test_kwargs,
        {
            "aggregation": aggregation,
            "pass_threshold": pass_threshold,
            "max_concurrency": max_concurrency,
        },
    )
    if job.scorer.evaluator.is_async:
        return asyncio.run(_score_async(rows, job))
    return job.in_order(rows, [job.scorer.score(**call) for call in job.calls(rows)])


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
    job = _job(
        evaluator,
        mode,
        evaluation_test_kwargs,
        {
            "aggregation": aggregation,
            "pass_threshold": pass_threshold,
            "max_concurrency": max_concurrency,
        },
    )
    return await _score_async(rows, job)


@dataclass(frozen=True, slots=True)
class _Job:
    scorer: Scorer
    mode: Mode
    kwargs: Mapping[str, Any]

    def calls(self, rows: Sequence[EvaluationRow]) -> list[dict[str, Any]]:
        """The arguments of the evaluator, call by call."""
        if self.mode == "pointwise":
            return [{"row": row, **self.kwargs} for row in rows]
        groups: dict[Any, list[EvaluationRow]] = {}
        for row in rows:
            groups.setdefault(_group(row) if self.mode == "groupwise" else None, []).append(row)
        return [{"rows": group, **self.kwargs} for group in groups.values()]

    def in_order(self, rows: Sequence[EvaluationRow], answers: Sequence[Any]) -> list[Any]:
        """What the calls answered with, in the order of `rows`; in a group, a row that the
        evaluator made anew has no place among them and comes last."""
        if self.mode == "pointwise":
            return list(answers)
        position = {id(row): i for i, row in enumerate(rows)}
        flat = [row for group in answers for row in group]
        return sorted(flat, key=lambda row: position.get(id(row), len(rows)))


def _job(
    evaluator: Callable[..., Any],
    mode: Mode | None,
    kwargs: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> _Job:
    function = inner_evaluator(evaluator)
    mode = mode_of(evaluator, function, mode)
    base = getattr(function.function, OPTIONS_ATTRIBUTE, ScoringOptions())
    chosen = {name: value for name, value in options.items() if value is not None}
    return _Job(
        scorer=Scorer(function, replace(base, **chosen)),
        mode=mode,
        kwargs=own_kwargs(evaluator) if kwargs is None else kwargs,
    )


def inner_evaluator(evaluator: Callable[..., Any]) -> Evaluator:
    """The function that scores: what `@evaluation_test` was put on, or `evaluator` itself."""
    return Evaluator.of(function_below(evaluator))


def mode_of(evaluator: Callable[..., Any], function: Evaluator, mode: Mode | None = None) -> Mode:
    """`mode`, or the one `@evaluation_test` brings, or what the parameter alone can mean.

    Raises:
        EvaluatorError: none of them says, or the mode does not fit the parameter.
    """
    test = parameters_of(evaluator)
    if mode is None and test is not None:
        mode = test.mode
    if mode is None:
        if function.parameter == "rows":
            raise EvaluatorError("an evaluator of `rows` needs mode='groupwise' or mode='all'")
        mode = "pointwise"
    if (mode == "pointwise") != (function.parameter == "row"):
        raise EvaluatorError(f"mode {mode!r} does not fit an evaluator of `{function.parameter}`")
    return mode


def own_kwargs(evaluator: Callable[..., Any]) -> Mapping[str, Any]:
    """The keyword arguments that `@evaluation_test` gives the evaluator.

    Raises:
        EvaluatorError: it gives several sets of them.
    """
    sets = sets_of(parameters_of(evaluator), "evaluation_test_kwargs")
    if len(sets) > 1:
        raise EvaluatorError(
            f"the evaluation test has {len(sets)} sets of evaluation_test_kwargs: pass the one to "
            "score with as evaluation_test_kwargs="
        )
    return sets[0] if sets else {}


def _group(row: EvaluationRow) -> tuple[Any, ...]:
    """Key of the row's prompt group. A row without a row_id is a group of its own."""
    row_id = row.input_metadata.row_id
    return (id(row),) if row_id is None else (row.execution_metadata.experiment_id, row_id)


async def _score_async(rows: Sequence[EvaluationRow], job: _Job) -> list[EvaluationRow]:
    calls = job.calls(rows)
    answers: list[Any] = [None] * len(calls)
    waiting = iter(enumerate(calls))

    async def work() -> None:
        for i, call in waiting:
            answers[i] = await job.scorer.score_async(**call)
            await asyncio.sleep(0)

    # Few workers rather than a task per row: views are made when a row's turn comes. A sync
    # evaluator sees one row after the other.
    workers = job.scorer.options.max_concurrency if job.scorer.evaluator.is_async else 1
    await run_all([work() for _ in range(min(len(calls), workers))])
    return job.in_order(rows, answers)


def _refuse_running_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError(
        "score_rows cannot run inside a running event loop (a notebook, an async test): "
        "use `await ascore_rows(...)`"
    )
