"""What an evaluator said of each completion, read strictly.

Invariant: a completion has a score only where the evaluator gave exactly one valid, finite one.
Otherwise its score is None, with the reason why in `error`; it is never 0.0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
from eval_protocol.models import EvaluateResult, EvaluationRow
from pydantic_core import to_jsonable_python

from eval_protocol_rft.record import CompletionResult
from eval_protocol_rft.scoring.evaluator import CallFailed

STEP_OUTPUTS = "step_outputs"
"""The metric that holds what an evaluator said of single steps."""


def unscored(error: str) -> CompletionResult:
    """The result of a completion about which nothing valid was said."""
    return CompletionResult(score=None, error=error)


def read_result(returned: Any) -> CompletionResult:
    """The result of one completion, from what the evaluator returned for its view.

    That is the view with an `evaluation_result`, a bare `EvaluateResult`, or a number, which is
    the score (True is 1.0; numpy's numbers too). Nothing else is read as a score.

    Score, reason and metrics are kept, metrics as plain JSON: numpy values become Python ones,
    NaN and infinities null, and a metric that is no JSON at all is left out and named in `error`.
    `step_outputs` are kept as the metric of that name, for a completion is a whole trajectory;
    `trajectory_info`, `final_control_plane_info` and other changes to the view are dropped.
    """
    if isinstance(returned, CallFailed):
        return unscored(returned.text)
    if isinstance(returned, Real | np.bool_):
        problem = _score_problem(returned, True)
        return unscored(problem) if problem else CompletionResult(score=float(returned))
    # Pydantic does not check assignments, so these fields can hold anything.
    result: Any = returned
    if isinstance(returned, EvaluationRow):
        result = returned.evaluation_result
        if result is None:
            return unscored("the evaluator returned no evaluation_result")
        if not isinstance(result, EvaluateResult):
            return unscored(f"evaluation_result is {type(result).__name__}, not an EvaluateResult")
    elif not isinstance(result, EvaluateResult):
        return unscored(
            f"the evaluator returned {type(returned).__name__}, not an EvaluationRow, an "
            "EvaluateResult or a number"
        )
    problem = _score_problem(result.score, result.is_score_valid)
    steps = {STEP_OUTPUTS: result.step_outputs} if result.step_outputs else {}
    metrics, dropped = _plain_metrics({**steps, **(result.metrics or {})})
    said = None if result.error is None else f"the evaluator reported: {result.error}"
    errors = [text for text in (problem, said, *dropped) if text]
    return CompletionResult(
        score=float(result.score) if problem is None else None,
        reason=None if result.reason is None else str(result.reason),
        metrics=metrics,
        error="; ".join(errors) or None,
    )


def _score_problem(score: Any, is_valid: Any) -> str | None:
    if not is_valid:
        return "the evaluator marked the score as invalid"
    if not isinstance(score, Real | np.bool_):
        return f"the score is {score!r}, not a number"
    try:
        finite = math.isfinite(score)
    except OverflowError:
        # An integer beyond the largest float; str() refuses the longest of them.
        return "the score is an integer too large for a float"
    return None if finite else f"the score is {score}, not a finite number"


def _plain_metrics(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Metrics as plain JSON, and what had to be left out."""
    plain: dict[str, Any] = {}
    dropped: list[str] = []
    for name, metric in metrics.items():
        try:
            builtin = to_jsonable_python(metric, fallback=_from_numpy)
        except (TypeError, ValueError) as error:
            dropped.append(f"metric {name!r} is left out, it is not JSON: {error}")
        else:
            # A second pass: in the first a model's own fields keep NaN whatever is asked for.
            plain[str(name)] = to_jsonable_python(builtin, inf_nan_mode="null")
    return plain, dropped


def _from_numpy(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")
