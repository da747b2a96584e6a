"""`@score_each_completion`: the decorator between `@evaluation_test` and the user's evaluator.

Invariant: Eval Protocol sees the user's function: its name, parameters, annotations, source file
and whether it is async.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast, overload

from eval_protocol_rft.scoring.evaluator import Evaluator, EvaluatorError
from eval_protocol_rft.scoring.scorer import Scorer
from eval_protocol_rft.scoring.summary import Aggregation, ScoringOptions

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
    if hasattr(function, "_origin_func"):
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
