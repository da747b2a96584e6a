"""One call of a loaded evaluator, from the JSON of its rows to one result per row.

Invariant: whatever the evaluator does to this call, each view gets exactly one result. Only
`pytest.exit`, by which its author asks for the end of the run, and cancellation from outside pass.
Where it is not the evaluator that failed, the outcome is not sound: what an earlier call did to
this process (code of models replaces what is built in) may be the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from eval_protocol.models import EvaluationRow
from pydantic import ValidationError

from eval_protocol_rft.record import Score
from eval_protocol_rft.scoring import (
    BoundCall,
    Place,
    inner_evaluator,
    read_result,
    sort_answers,
    unscored,
)
from eval_protocol_rft.scoring.executors._loading import LoadedEvaluator

Results = tuple[Score, ...]


class Outcome(NamedTuple):
    """What became of a call."""

    results: Results
    is_sound: bool = True


def call_of(loaded: LoadedEvaluator) -> BoundCall:
    """The call of an evaluator as `load_evaluator` gave it; its row or rows are put in later."""
    inner = inner_evaluator(loaded.function)
    return inner.bind(**{inner.parameter: None}, **loaded.kwargs)


def score_views(call: BoundCall, views: Sequence[bytes]) -> Outcome:
    """Results of a sync evaluator, one per view."""
    try:
        rows = _rows(views)
        return Outcome(_read(call, rows, call.attempt(_argument(call, rows))))
    except pytest.exit.Exception:
        raise
    except BaseException as error:  # noqa: BLE001
        # Graders run code that models wrote: sys.exit() in it must not end the run.
        return _stopped(views, error)


async def score_views_async(call: BoundCall, views: Sequence[bytes]) -> Outcome:
    """Results of an async evaluator, one per view."""
    try:
        rows = _rows(views)
        return Outcome(_read(call, rows, await call.attempt_async(_argument(call, rows))))
    except pytest.exit.Exception:
        raise
    except BaseException as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        return _stopped(views, error)


def _argument(call: BoundCall, rows: list[EvaluationRow]) -> Any:
    return rows[0] if call.evaluator.parameter == "row" else rows


def _read(call: BoundCall, rows: list[EvaluationRow], returned: Any) -> Results:
    if call.evaluator.parameter == "row":
        return (read_result(returned),)
    # Rows of one completion each: the second half of a place only names it in messages.
    layout: dict[Place, EvaluationRow] = {
        (i, (row.execution_metadata.extra or {}).get("completion_index", i)): row
        for i, row in enumerate(rows)
    }
    results, _ = sort_answers(layout, returned)
    return tuple(results[i][0] for i in range(len(rows)))


def _rows(views: Sequence[bytes]) -> list[EvaluationRow]:
    return [EvaluationRow.model_validate_json(view) for view in views]


def _stopped(views: Sequence[bytes], error: BaseException) -> Outcome:
    """`str()` only of errors that are not the evaluator's: its own may raise there again."""
    if isinstance(error, ValidationError):
        text = f"the stored row cannot be read: {error}"
    elif isinstance(error, SystemExit):
        text = f"the evaluator called sys.exit ({error.code!r})"
    else:
        text = f"the evaluator raised {type(error).__name__}"
    # What an evaluator raises of these is a result of its call already.
    return Outcome((unscored(text),) * len(views), not isinstance(error, Exception))
