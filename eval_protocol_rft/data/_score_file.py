"""A rollout file while it is scored: which completions are to be graded, how an evaluator sees
them, and their rewards on their way into a new column.

Invariant: a view is what the evaluator would have been given had it run right after the rollout:
see `completion_views`; token data is not read for it. What `store_scores` was given is on disk
after one wait for the disk, also where a judge takes minutes for the next result; however it ends,
all of it is stored. Every other value of the file stays as it is, and the rows keep their order.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eval_protocol_rft._text import text_of, well_formed_json
from eval_protocol_rft.data import _format as file_format
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.data._format import CompletionRow
from eval_protocol_rft.data._job_store import KEY_COLUMNS, JobStore, Keys
from eval_protocol_rft.data._records import by_record
from eval_protocol_rft.data._to_ep import to_row
from eval_protocol_rft.record import Score
from eval_protocol_rft.scoring.executors import LoadedEvaluator, ScoredItem, ScoringItem

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
    columns = [name for name in dataset.schema.names if name not in file_format.TOKEN_COLUMNS]
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


SCORES = pa.schema(
    [
        ("data_idx", pa.int64()),
        ("sample_idx", pa.int32()),
        ("reward", pa.float64()),
        ("reason", pa.string()),
        ("metrics", pa.string()),
        ("error", pa.string()),
    ]
)
"""Rewards on their way into a file. `error`: why there is none."""
_VALUES = ("reward", "reason", "metrics", "error")


def schema_with_reward(
    known: pa.Schema, column: str, settings: file_format.RewardSettings
) -> pa.Schema:
    """The schema of a file that also has the reward `column`."""
    metadata = file_format.metadata_of(known)
    changed = msgspec.structs.replace(metadata, rewards={**metadata.rewards, column: settings})
    original = {
        field.name.removeprefix(file_format.ORIGINAL_PREFIX): field.type
        for field in known
        if field.name.startswith(file_format.ORIGINAL_PREFIX)
    }
    full = file_format.schema(
        changed,
        original,
        ground_truth=known.field("ground_truth").type,
        episodes="turns" in known.names,
    )
    foreign = [field for field in known if field.name not in full.names]
    return pa.schema([*full, *foreign]).with_metadata(
        {**(known.metadata or {}), file_format.METADATA_KEY: changed.encode()}
    )


def with_scores(
    dataset: RolloutDataset,
    store: JobStore,
    wanted: pa.Schema,
    column: str,
    *,
    places: Callable[[pa.Table], Keys],
    keep: bool,
) -> Iterator[pa.Table]:
    """Tables of a file with rewards in them.

    Args:
        dataset: the file.
        store: rows of `SCORES`; not every completion needs one.
        wanted: schema of the result.
        column: of the rewards.
        places: number of each row of a table in the file.
        keep: where there is no new reward, the old one stays; else it goes.
    """
    for table, scores in store.beside(dataset.tables()):
        yield _filled(table, scores, wanted, column, places=places, keep=keep)


def _filled(
    table: pa.Table,
    scores: pa.Table,
    wanted: pa.Schema,
    column: str,
    *,
    places: Callable[[pa.Table], Keys],
    keep: bool,
) -> pa.Table:
    """One table with its rewards."""
    spots = places(scores) - int(places(table)[0])
    graded = np.zeros(len(table), np.bool_)
    graded[spots] = True
    chosen = np.full(len(table), -1, np.int64)
    chosen[spots] = np.arange(len(scores))
    indices = pa.array(chosen, mask=~graded)
    names = file_format.reward_columns(column)
    values = {
        name: scores.column(value).take(indices) for name, value in zip(names, _VALUES, strict=True)
    }
    if keep:
        values = {
            name: pc.if_else(pa.array(graded), value, table.column(name))
            for name, value in values.items()
        }
    if column == "reward":
        values["evaluation_row"] = _without_result(table.column("evaluation_row"))
    columns = [
        values[field.name]
        if field.name in values
        else table.column(field.name)
        if field.name in table.schema.names
        else pa.nulls(len(table), field.type)
        for field in wanted
    ]
    return pa.Table.from_arrays(columns, schema=wanted)


def _without_result(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Rows of Eval Protocol without the evaluation result that other rewards gave."""
    if column.null_count == len(column):
        return column
    encoded = column.combine_chunks().dictionary_encode()
    texts = []
    for text in encoded.dictionary.to_pylist():
        row = msgspec.json.decode(text)
        row.pop("evaluation_result", None)
        texts.append(msgspec.json.encode(row).decode())
    return pa.chunked_array([pa.array(texts, pa.string()).take(encoded.indices)])


def store_scores(
    results: Iterable[ScoredItem], store: JobStore, *, on_stored: Callable[[int], None]
) -> int:
    """Store results in rows of `SCORES`, from a thread of its own, many with one wait; returns the
    number of completions.

    Args:
        results: as they come.
        store: where they go.
        on_stored: called in that thread with how many were stored so far.

    Raises:
        OSError: the disk is full or failed.
    """
    waiting: queue.SimpleQueue[ScoredItem | None] = queue.SimpleQueue()
    with ThreadPoolExecutor(1, "rewards-store") as thread:
        writing = thread.submit(_write, waiting, store, on_stored)
        try:
            for item in results:
                waiting.put(item)
                if writing.done():
                    break
        finally:
            waiting.put(None)
            count = writing.result()
    return count


def _write(
    waiting: queue.SimpleQueue[ScoredItem | None], store: JobStore, on_stored: Callable[[int], None]
) -> int:
    count = 0
    more = True
    while more:
        taken = [waiting.get()]
        while not waiting.empty():
            taken.append(waiting.get_nowait())
        more = taken[-1] is not None
        scores = [
            score
            for item in taken
            if item is not None
            for score in zip(item.key, item.results, strict=True)
        ]
        if scores:
            store.append(_batch(scores))
            count += len(scores)
            on_stored(count)
    return count


def _batch(scores: Sequence[tuple[Place, Score]]) -> pa.RecordBatch:
    """Scores as rows of `SCORES`."""
    rows = [(*place, s.reward, s.reason, _json_or_none(s.metrics), s.error) for place, s in scores]
    columns = zip(*rows, strict=True)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, SCORES, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=SCORES)


def _json_or_none(metrics: Mapping[str, float] | None) -> str | None:
    return msgspec.json.encode(metrics).decode() if metrics else None


class FileIndex:
    """Where each completion of a file stands, and whether it is to be graded: nine bytes for each.

    Args:
        dataset: the file, all rows of which are looked at.
        column: of the rewards.
        keep: rewards that are there stay, and what has one is not graded.
        retry_unscored: with `keep`, grade again what was graded and got none.
    """

    def __init__(
        self, dataset: RolloutDataset, column: str, *, keep: bool, retry_unscored: bool
    ) -> None:
        reward, _, _, error = file_format.reward_columns(column)
        columns = [*KEY_COLUMNS, "error", *([reward, error] if keep else [])]
        data_idx, sample_idx, wanted = [], [], []
        for table in dataset.tables(list(dict.fromkeys(columns))):
            data_idx.append(np.asarray(table.column("data_idx"), np.int64))
            sample_idx.append(np.asarray(table.column("sample_idx"), np.int64))
            missing = np.asarray(table.column("error").is_null())
            if keep:
                missing &= np.asarray(table.column(reward).is_null())
                if not retry_unscored:
                    missing &= np.asarray(table.column(error).is_null())
            wanted.append(missing)
        rows, samples = np.concatenate(data_idx), np.concatenate(sample_idx)
        shape = (int(rows.max()) + 1, int(samples.max()) + 1)
        self._place = np.full(shape, -1, np.int64)
        """[data rows, n] number of the completion's row; -1 where there is none."""
        self._place[rows, samples] = np.arange(len(rows))
        self.wanted = np.zeros(shape, np.bool_)
        """[data rows, n]"""
        self.wanted[rows, samples] = np.concatenate(wanted)

    def places(self, table: pa.Table) -> Keys:
        """[N] numbers of rows in the file; they are the order of everything here."""
        rows = np.asarray(table.column("data_idx"), np.int64)
        samples = np.asarray(table.column("sample_idx"), np.int64)
        places: Keys = self._place[rows, samples]
        return places

    def stored(self, places: Keys) -> None:
        """The rows in these places were graded by an earlier call."""
        graded = np.zeros(int(self._place.max()) + 1, np.bool_)
        graded[places] = True
        self.wanted &= ~graded[self._place]  # where there is no row, nothing is wanted
