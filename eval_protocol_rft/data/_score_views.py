"""Stored completions as an evaluator gets to see them.

Invariant: a view is what the evaluator would have been given had it run right after the rollout:
see `scoring.views`. Token data is not read for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft._text import text_of, well_formed_json
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.data.conversion._to_ep import to_row
from eval_protocol_rft.data.rollouts._format import TOKEN_COLUMNS
from eval_protocol_rft.data.rollouts._rows import CompletionRow, by_record
from eval_protocol_rft.scoring.executors import LoadedEvaluator, ScoringItem

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow

Place = tuple[int, int]
"""(data_idx, sample_idx)"""


def grading_items(
    dataset: RolloutDataset,
    evaluator: LoadedEvaluator,
    wanted: NDArray[np.bool_],
    *,
    adapt: bool,
) -> Iterator[ScoringItem]:
    """What the evaluator is to be called with; keys are tuples of `Place`s, one per view.

    Args:
        dataset: the completions.
        evaluator: pointwise: an item per wanted completion; groupwise: one per data row with a
            wanted completion, with all of the row; all: one with everything.
        wanted: [data rows, n] which completions are to be graded.
        adapt: let the evaluation test's `dataset_adapter` make the rows of the data set's columns.

    Raises:
        JobError: the adapter fails, or makes no row.
    """
    adapter = evaluator.dataset_adapter if adapt else None
    groups = (_with_views(group, dataset, adapter) for group in _groups(dataset))
    if evaluator.mode == "all":
        everything = [pair for pairs in groups for pair in pairs]
        if wanted.any():
            yield _item(everything)
        return
    for both in groups:
        chosen = [(row, view) for row, view in both if wanted[row.data_idx, row.sample_idx]]
        if evaluator.mode == "pointwise":
            yield from (_item([pair]) for pair in chosen)
        elif chosen:
            yield _item(both)


def _item(pairs: Iterable[tuple[CompletionRow, bytes]]) -> ScoringItem:
    pairs = list(pairs)
    places = tuple((row.data_idx, row.sample_idx) for row, _ in pairs)
    return ScoringItem(places, tuple(view for _, view in pairs))


def _groups(dataset: RolloutDataset) -> Iterator[list[CompletionRow]]:
    """The completions of each data row that were sampled, without their tokens."""
    columns = [name for name in dataset.schema.names if name not in TOKEN_COLUMNS]
    for group in dataset.groups(columns):
        survivors = [row for row in group if not row.failed]
        if survivors:
            yield survivors


def _with_views(
    group: list[CompletionRow], dataset: RolloutDataset, adapter: Callable[..., Any] | None
) -> list[tuple[CompletionRow, bytes]]:
    """The completions of a data row, run by run, each with its view."""
    return [
        pair
        for part in by_record(group)
        for pair in zip(part, _views(part, dataset, adapter), strict=True)
    ]


def _views(
    group: list[CompletionRow], dataset: RolloutDataset, adapter: Callable[..., Any] | None
) -> list[bytes]:
    from eval_protocol.models import EvaluationRow

    from eval_protocol_rft.scoring import completion_views

    values = to_row(group, dataset.metadata, tokens="none")
    row = EvaluationRow.model_validate(values)
    if adapter is not None and group[0].original:
        row = _adapted(row, group[0], adapter)
    views = completion_views(row)
    assert views is not None  # noqa: S101 - it has the record that was put there
    return [_encoded(view) for view in views]


def _encoded(view: EvaluationRow) -> bytes:
    try:
        return view.model_dump_json(exclude_none=True).encode()
    except ValueError:
        # Half a surrogate pair, which only an adapter can have put there.
        values = well_formed_json(view.model_dump(exclude_none=True))
        return type(view).model_validate(values).model_dump_json(exclude_none=True).encode()


def _adapted(
    row: EvaluationRow, completion: CompletionRow, adapter: Callable[..., Any]
) -> EvaluationRow:
    """The row with what the adapter makes of the data set's columns, but with its own messages."""
    where = f"row {completion.row_id}: the dataset_adapter of the evaluation test"
    advice = "leave it out with --no-adapter"
    try:
        made = adapter([dict(completion.original)])
    # It is the user's: it raises whatever its expressions raise.
    except Exception as error:
        raise JobError(
            f"{where} failed: {type(error).__name__}: {text_of(error)}; {advice}"
        ) from error
    if len(made) != 1:
        raise JobError(f"{where} made {len(made)} rows of one; {advice}")
    adapted: EvaluationRow = made[0].model_copy(deep=True)
    adapted.messages = row.messages
    adapted.execution_metadata = row.execution_metadata
    adapted.rollout_status = row.rollout_status
    adapted.input_metadata.row_id = row.input_metadata.row_id
    return adapted
