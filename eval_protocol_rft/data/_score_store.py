"""Rewards on their way to the disk.

Invariant: what `add` was given is on disk after one wait for the disk, not when the next result
comes: a judge may take minutes for that. However the block ends, all of it is stored.

A column of rewards put into a file.

Invariant: every other value of the file stays as it is, and the rows keep their order.

Where each completion stands in a file, and whether it is to be graded.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._job_store import KEY_COLUMNS, JobStore, Keys
from eval_protocol_rft.data._score_views import Place
from eval_protocol_rft.data.rollouts._format import (
    METADATA_KEY,
    ORIGINAL_PREFIX,
    RewardSettings,
    metadata_of,
    reward_columns,
    schema,
)
from eval_protocol_rft.record import Score
from eval_protocol_rft.scoring.executors import ScoredItem

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


def schema_with_reward(known: pa.Schema, column: str, settings: RewardSettings) -> pa.Schema:
    """The schema of a file that also has the reward `column`."""
    metadata = metadata_of(known)
    changed = msgspec.structs.replace(metadata, rewards={**metadata.rewards, column: settings})
    original = {
        field.name.removeprefix(ORIGINAL_PREFIX): field.type
        for field in known
        if field.name.startswith(ORIGINAL_PREFIX)
    }
    full = schema(
        changed,
        original,
        ground_truth=known.field("ground_truth").type,
        episodes="turns" in known.names,
    )
    foreign = [field for field in known if field.name not in full.names]
    return pa.schema([*full, *foreign]).with_metadata(
        {**(known.metadata or {}), METADATA_KEY: changed.encode()}
    )


def with_scores(
    tables: Iterator[pa.Table],
    scores: Iterator[pa.Table],
    wanted: pa.Schema,
    column: str,
    *,
    places: Callable[[pa.Table], Keys],
    keep: bool,
) -> Iterator[pa.Table]:
    """Tables of a file with rewards in them.

    Args:
        tables: the file's rows.
        scores: rows of `SCORES` in the file's order; not every completion needs one.
        wanted: schema of the result.
        column: of the rewards.
        places: number of each row of a table in the file.
        keep: where there is no new reward, the old one stays; else it goes.
    """
    pending = SCORES.empty_table()
    for table in tables:
        last = int(places(table)[-1])
        while not len(pending) or int(places(pending)[-1]) <= last:
            more = next(scores, None)
            if more is None:
                break
            pending = pa.concat_tables([pending, more])
        size = int(np.searchsorted(places(pending), last, side="right"))
        yield _filled(table, pending.slice(0, size), wanted, column, places=places, keep=keep)
        pending = pending.slice(size).combine_chunks()


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
    names = reward_columns(column)
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


Result = tuple[Place, Score]


class GradedStore:
    """Stores results from a thread of its own, many with one wait. A context manager.

    Args:
        store: of rows like `SCORES`.
        on_stored: called in that thread with how many were stored so far.

    Raises:
        OSError: from `add` or at the end: the disk is full or failed.
    """

    def __init__(self, store: JobStore, *, on_stored: Callable[[int], None]) -> None:
        self._store = store
        self._on_stored = on_stored
        self._queue: queue.SimpleQueue[ScoredItem | None] = queue.SimpleQueue()
        self._executor = ThreadPoolExecutor(1, "rewards-store")
        self._writing: Future[int] = self._executor.submit(self._write)
        self.count = 0
        """Results stored; known at the end."""

    def add(self, graded: ScoredItem) -> None:
        self._queue.put(graded)
        if self._writing.done():
            self._writing.result()

    def __enter__(self) -> GradedStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._queue.put(None)
        self._executor.shutdown()
        self.count = self._writing.result()

    def _write(self) -> int:
        count = 0
        more = True
        while more:
            taken = [self._queue.get()]
            while not self._queue.empty():
                taken.append(self._queue.get_nowait())
            more = taken[-1] is not None
            results = [
                result
                for graded in taken
                if graded is not None
                for result in zip(graded.key, graded.results, strict=True)
            ]
            if results:
                self._store.append(_batch(results))
                count += len(results)
                self._on_stored(count)
        return count


def _batch(results: Sequence[Result]) -> pa.RecordBatch:
    """Results as rows of `SCORES`."""
    said = [result for _, result in results]
    metrics = [msgspec.json.encode(r.metrics).decode() if r.metrics else None for r in said]
    columns = [
        [place[0] for place, _ in results],
        [place[1] for place, _ in results],
        [result.reward for result in said],
        [result.reason for result in said],
        metrics,
        [result.error for result in said],
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, SCORES, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=SCORES)


@dataclass(slots=True)
class FileIndex:
    """Nine bytes per completion."""

    place: NDArray[np.int64]
    """[data rows, n] number of the completion's row; -1 where there is none."""
    wanted: NDArray[np.bool_]
    """[data rows, n]"""

    @classmethod
    def of(
        cls, dataset: RolloutDataset, column: str, *, keep: bool, retry_unscored: bool
    ) -> FileIndex:
        """Look at all rows of a file.

        Args:
            dataset: the file.
            column: of the rewards.
            keep: rewards that are there stay, and what has one is not graded.
            retry_unscored: with `keep`, grade again what was graded and got none.
        """
        reward, _, _, error = reward_columns(column)
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
        index = cls(np.full(shape, -1, np.int64), np.zeros(shape, np.bool_))
        index.place[rows, samples] = np.arange(len(rows))
        index.wanted[rows, samples] = np.concatenate(wanted)
        return index

    def places(self, table: pa.Table) -> Keys:
        """[N] numbers of rows in the file; they are the order of everything here."""
        rows = np.asarray(table.column("data_idx"), np.int64)
        samples = np.asarray(table.column("sample_idx"), np.int64)
        places: Keys = self.place[rows, samples]
        return places

    def stored(self, places: Keys) -> None:
        """The rows in these places were graded by an earlier call."""
        graded = np.zeros(int(self.place.max()) + 1, np.bool_)
        graded[places] = True
        self.wanted &= ~graded[self.place]  # where there is no row, nothing is wanted
