"""What an evaluator said of each completion, read strictly.

Invariant: a completion has a score only where the evaluator gave exactly one valid, finite one.
Otherwise its score is None, with the reason why in `error`; it is never 0.0. All of it is plain
JSON in text that UTF-8 can hold.

Of many rows in one call a result is credited to one completion only if the evaluator returned
exactly one row for it. Order does not matter; what is missing or doubled is an error that names the
completion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from eval_protocol.models import EvaluateResult, EvaluationRow
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from eval_protocol_rft._text import text_of, well_formed, well_formed_json
from eval_protocol_rft.record import Score
from eval_protocol_rft.scoring._evaluator import CallFailed

_SHOWN = 200
"""Characters of a score that is none."""
STEP_OUTPUTS = "step_outputs"
"""The metric that holds what an evaluator said of single steps."""


def unscored(error: str) -> Score:
    """The result of a completion about which nothing valid was said."""
    return Score(error=well_formed(error))


def read_result(returned: Any) -> Score:
    """The result of one completion, from what the evaluator returned for its view.

    That is the view with an `evaluation_result`, a bare `EvaluateResult`, or a number, which is
    the score (True is 1.0; numpy's numbers too). Nothing else is read as a score.

    Score, reason and metrics are kept, metrics as plain JSON: numpy values become Python ones, and
    text that UTF-8 cannot hold loses a character. A metric that is no JSON at all, or whose score
    is no finite number, is left out and named in `error`; NaN and infinities elsewhere in a metric
    become null, and are named there too.
    `step_outputs` are kept as the metric of that name, for a completion is a whole trajectory;
    `trajectory_info`, `final_control_plane_info` and other changes to the view are dropped.
    """
    if isinstance(returned, CallFailed):
        return unscored(returned.text)
    try:
        return _read(returned)
    # Its parts are the user's: reading them raises whatever their methods raise.
    except Exception as error:  # noqa: BLE001
        kind = type(returned).__name__
        problem = f"{type(error).__name__}: {text_of(error)}"
        return unscored(f"what the evaluator returned ({kind}) cannot be read: {problem}")


def _read(returned: Any) -> Score:
    if isinstance(returned, Real | np.bool_):
        problem = _score_problem(returned, True)
        return unscored(problem) if problem else Score(reward=float(returned))
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
    report = None if result.error is None else f"the evaluator reported: {text_of(result.error)}"
    errors = [text for text in (problem, report, *dropped) if text]
    return Score(
        reward=float(result.score) if problem is None else None,
        reason=None if result.reason is None else text_of(result.reason),
        metrics=metrics,
        error=well_formed("; ".join(errors)) or None,
    )


def _score_problem(score: Any, is_valid: Any) -> str | None:
    if not is_valid:
        return "the evaluator marked the score as invalid"
    if not isinstance(score, Real | np.bool_):
        shown = repr(score)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        return f"the score is {shown}, not a number"
    try:
        finite = math.isfinite(score)
    except OverflowError:
        # An integer beyond the largest float; str() refuses the longest of them.
        return "the score is an integer too large for a float"
    return None if finite else f"the score is {score}, not a finite number"


def _plain_metrics(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Metrics as plain JSON, and what had to be left out or changed."""
    plain: dict[str, Any] = {}
    problems: list[str] = []
    for key, metric in metrics.items():
        name = text_of(key)
        try:
            finite, nulls = _without_nan(_plain(metric))
        except (TypeError, ValueError, RecursionError) as error:
            problems.append(f"metric {name!r} is left out, it is not JSON: {text_of(error)}")
            continue
        if "score" in nulls or "" in nulls:
            problems.append(f"metric {name!r} is left out: its score is not a finite number")
            continue
        if nulls:
            problems.append(f"metric {name!r} has numbers that are not finite: {', '.join(nulls)}")
        plain[name] = finite
    return plain, problems


def _plain(metric: Any) -> Any:
    """JSON values, NaN still in them: models are taken apart first, for Pydantic makes NaN null in
    some of their fields, and cannot read half a surrogate pair in a key."""
    parts = metric if isinstance(metric, list) else [metric]
    values = [m.model_dump(warnings=False) if isinstance(m, BaseModel) else m for m in parts]
    plain = to_jsonable_python(well_formed_json(values), fallback=_from_numpy)
    return plain if isinstance(metric, list) else plain[0]


def _without_nan(value: Any, where: str = "") -> tuple[Any, list[str]]:
    """The value with null for each number that JSON has no form for, and where they were."""
    if isinstance(value, float) and not math.isfinite(value):
        return None, [where]
    if not isinstance(value, dict | list):
        return value, []
    nulls: list[str] = []
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    kept: dict[Any, Any] = {}
    for key, item in pairs:
        kept[key], more = _without_nan(item, f"{where}.{key}" if where else str(key))
        nulls += more
    return (kept if isinstance(value, dict) else list(kept.values())), nulls


def _from_numpy(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


Place = tuple[int, int | None]
"""Which row of the call, and which of its completions; None: the row itself, it has no record."""


def lay_out(
    rows: Sequence[EvaluationRow], views: Sequence[Sequence[EvaluationRow] | None]
) -> dict[Place, EvaluationRow]:
    """All completions of all rows in row order; a row whose views are None stands for itself."""
    layout: dict[Place, EvaluationRow] = {}
    for i, (row, row_views) in enumerate(zip(rows, views, strict=True)):
        if row_views is None:
            layout[i, None] = row
        else:
            layout.update({(i, index): view for index, view in enumerate(row_views)})
    return layout


def sort_answers(
    layout: Mapping[Place, EvaluationRow], returned: Any
) -> tuple[dict[int, list[Score]], dict[int, list[EvaluationRow]]]:
    """Credit what the evaluator returned for `layout` to the places it is about.

    A returned row belongs to the view that it is; where the evaluator made a new object, to the
    view with the same rollout id and `completion_index`.

    Returns:
        By position of the row in the call: of each that has a record, a result per completion, in
        order; of each that has none, the rows that the evaluator returned for it.
    """
    by_place, strays, problem = _assign(layout, returned)
    results: dict[int, list[Score]] = {}
    passed: dict[int, list[EvaluationRow]] = {}
    for place, view in layout.items():
        row, index = place
        rows = by_place.get(place, [])
        if index is None:
            passed[row] = rows
        else:
            result = problem or _only_result(rows, view, index, strays)
            results.setdefault(row, []).append(result)
    return results, passed


def _assign(
    layout: Mapping[Place, EvaluationRow], returned: Any
) -> tuple[dict[Place, list[EvaluationRow]], int, Score | None]:
    """The returned rows by place, how many fit none, and what is wrong with the call itself."""
    if isinstance(returned, CallFailed):
        return {}, 0, read_result(returned)
    if not isinstance(returned, list):
        kind = type(returned).__name__
        return {}, 0, unscored(f"the evaluator returned {kind}, not a list of EvaluationRow")
    by_identity = {id(view): place for place, view in layout.items()}
    by_key = _places_by_key(layout)
    by_place: dict[Place, list[EvaluationRow]] = {}
    strays = 0
    for item in returned:
        place = by_identity.get(id(item))
        if place is None and isinstance(item, EvaluationRow):
            place = by_key.get(_key(item))
        if place is None:
            strays += 1
        else:
            by_place.setdefault(place, []).append(item)
    return by_place, strays, None


def _places_by_key(layout: Mapping[Place, EvaluationRow]) -> dict[tuple[Any, Any], Place]:
    """Places by (rollout id, completion index). Rollout ids are not unique everywhere (rows may
    bring their own): a key that two places share tells nothing and is left out."""
    places: dict[tuple[Any, Any], Place] = {}
    shared = set()
    for place, view in layout.items():
        key = _key(view)
        if places.setdefault(key, place) != place:
            shared.add(key)
    return {key: place for key, place in places.items() if key not in shared}


def _key(row: EvaluationRow) -> tuple[Any, Any]:
    metadata = row.execution_metadata
    return metadata.rollout_id, (metadata.extra or {}).get("completion_index")


def _only_result(
    rows: Sequence[EvaluationRow], view: EvaluationRow, index: int, strays: int
) -> Score:
    if len(rows) == 1:
        return read_result(rows[0])
    where = f"completion {index} of rollout {view.execution_metadata.rollout_id}"
    if rows:
        return unscored(f"the evaluator returned {len(rows)} rows for {where}, expected one")
    also = f" ({strays} of the rows it returned belong to no completion)" if strays else ""
    return unscored(f"the evaluator returned no row for {where}{also}")
