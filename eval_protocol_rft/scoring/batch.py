"""Many rows in one call: views laid out flat, and the way back from the list it returns.

Invariant: a result is credited to one completion only if the evaluator returned exactly one row
for it. Order does not matter; what is missing or doubled is an error that names the completion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eval_protocol.models import EvaluationRow

from eval_protocol_rft.record import CompletionResult
from eval_protocol_rft.scoring.evaluator import CallFailed
from eval_protocol_rft.scoring.results import read_result, unscored

Place = tuple[int, int | None]
"""Which row of the call, and which of its completions; None: the row itself, it has no record."""


class Answers(NamedTuple):
    """What one call said of the rows it was given, by their position in the call."""

    results: dict[int, list[CompletionResult]]
    """Per row with a record: a result per completion, in order."""
    passed: dict[int, list[EvaluationRow]]
    """Per row without one: the rows that the evaluator returned for it."""


def lay_out(
    rows: Sequence[EvaluationRow], views: Sequence[Sequence[EvaluationRow] | None]
) -> dict[Place, EvaluationRow]:
    """All completions of all rows in row order; a row whose views are None stands for itself."""
    layout: dict[Place, EvaluationRow] = {}
    for i, (row, own) in enumerate(zip(rows, views, strict=True)):
        if own is None:
            layout[i, None] = row
        else:
            layout.update({(i, index): view for index, view in enumerate(own)})
    return layout


def sort_answers(layout: Mapping[Place, EvaluationRow], returned: Any) -> Answers:
    """Credit what the evaluator returned for `layout` to the places it is about.

    A returned row belongs to the view that it is; where the evaluator made a new object, to the
    view with the same rollout id and `completion_index`.
    """
    found, strays, problem = _assign(layout, returned)
    answers = Answers({}, {})
    for place, view in layout.items():
        row, index = place
        rows = found.get(place, [])
        if index is None:
            answers.passed[row] = rows
        else:
            result = problem or _only_result(rows, view, index, strays)
            answers.results.setdefault(row, []).append(result)
    return answers


def _assign(
    layout: Mapping[Place, EvaluationRow], returned: Any
) -> tuple[dict[Place, list[EvaluationRow]], int, CompletionResult | None]:
    """The returned rows by place, how many fit none, and what is wrong with the call itself."""
    if isinstance(returned, CallFailed):
        return {}, 0, read_result(returned)
    if not isinstance(returned, list):
        kind = type(returned).__name__
        return {}, 0, unscored(f"the evaluator returned {kind}, not a list of EvaluationRow")
    by_identity = {id(view): place for place, view in layout.items()}
    by_key = _places_by_key(layout)
    found: dict[Place, list[EvaluationRow]] = {}
    strays = 0
    for item in returned:
        place = by_identity.get(id(item))
        if place is None and isinstance(item, EvaluationRow):
            place = by_key.get(_key(item))
        if place is None:
            strays += 1
        else:
            found.setdefault(place, []).append(item)
    return found, strays, None


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
) -> CompletionResult:
    if len(rows) == 1:
        return read_result(rows[0])
    where = f"completion {index} of rollout {view.execution_metadata.rollout_id}"
    if rows:
        return unscored(f"the evaluator returned {len(rows)} rows for {where}, expected one")
    also = f" ({strays} of the rows it returned belong to no completion)" if strays else ""
    return unscored(f"the evaluator returned no row for {where}{also}")
