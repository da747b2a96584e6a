"""The unfinished job: rows on their way to a file, in SQLite, in a folder beside that file.

Invariant: what `append` returned for is on disk, and can be read from here or from the finished
file until the one takes the place of the other. A row that was appended twice counts once, the
later one. One process at a time writes; any number read meanwhile, and none of them sees half a
batch. Only what a job wrote is deleted: files of its names, and never through a link.

docs/format.md says what is in the file. Rows come and go as Arrow batches; of what they hold only
the column `error` matters here, which is null where a row is no failure.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eval_protocol_rft._durable import link_target, sync_folder
from eval_protocol_rft.data import _job_file as job_file
from eval_protocol_rft.data._format import FormatError

KEY_COLUMNS = ["data_idx", "sample_idx"]
Keys = NDArray[np.int64]
_SAMPLE_BITS = 31
PACKED_ROWS = 4096
PACKED_BYTES = 4 << 20
"""Batches are packed into one when they have so many rows or bytes together: single completions
take three times the room, and longer to read."""
_READ_ROWS = 1024
_READ_BYTES = 4 << 20
"""So much is read at a time."""
_OPEN_BATCHES = 2
"""Decoded batches that a reader keeps for what it reads next: rows came nearly in order."""
_COMPRESSED = pa.ipc.IpcWriteOptions(
    compression=pa.Codec("zstd", compression_level=1), use_threads=False
)


def parts_folder(output: Path, column: str | None = None) -> Path:
    """Where the unfinished job for `output` lies; with `column`, the one that scores it."""
    target = link_target(output)
    middle = "" if column is None else f".{column}"
    return target.with_name(f"{target.name}{middle}.parts")


def row_keys(table: pa.Table | pa.RecordBatch, position: Keys | None) -> Keys:
    """[N] sort keys of rows: by place of the data row in the run, then by `sample_idx`.

    Args:
        table: with `data_idx` and `sample_idx`.
        position: `data_idx` -> place in the run; None where that is `data_idx` itself.
    """
    data_idx = np.asarray(table.column("data_idx"), np.int64)
    sample_idx = np.asarray(table.column("sample_idx"), np.int64)
    places: Keys = data_idx if position is None else position[data_idx]
    return (places << _SAMPLE_BITS) | sample_idx


def split_keys(keys: Keys) -> tuple[Keys, Keys]:
    """(place of the data row in the run, sample_idx) of keys that `row_keys` made."""
    return keys >> _SAMPLE_BITS, keys & ((1 << _SAMPLE_BITS) - 1)


def failed_rows(table: pa.Table | pa.RecordBatch) -> NDArray[np.bool_]:
    """[N] which rows are failures."""
    return np.asarray(table.column("error").is_valid(), np.bool_)


def lock_folder(folder: Path) -> filelock.BaseFileLock:
    """Make `folder` where it is not, and hold it.

    Raises:
        BusyError: another process holds it.
        FormatError: it, or a job's file in it, is a link, and what that leads to is not ours.
        OSError: it cannot be made.
    """
    job_file.refuse_link(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if job_file.OURS.fullmatch(path.name):
            job_file.refuse_link(path)
    lock = filelock.FileLock(folder / "_lock", timeout=0, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise job_file.BusyError(
            f"{folder}: another process is writing here; wait for it, or stop it"
        ) from None
    return lock


def read_schema(folder: Path) -> pa.Schema | None:
    """What the job in `folder` was asked to do; None where there is no job.

    Raises:
        FormatError: it cannot be read, or is of another release of this package.
        BusyError: another program holds it.
    """
    if (folder / "_schema").exists():
        raise FormatError(
            f"{folder}: an earlier release of this package began this job, in files of another "
            "kind. Finish it with that release, or move the folder away to begin it anew"
        )
    return job_file.schema_of(folder / job_file.FILE)


def stored_tables(
    folder: Path, schema: pa.Schema, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """What is stored of the job in `folder`, whoever may be writing there, in the order of the file
    that it is to write, in tables that are not empty. What a running job stores meanwhile may be
    among it.

    Raises:
        FormatError: the file was damaged, or is no longer there.
    """
    with job_file.reading(folder / job_file.FILE) as connection:
        for _, _, table in _ordered(connection, folder / job_file.FILE, schema, columns):
            yield table


def count_stored(folder: Path) -> int:
    """How many rows are stored of the job in `folder`."""
    with job_file.reading(folder / job_file.FILE) as connection:
        return _count(connection)


class JobStore:
    """Rows on their way to a file.

    Args:
        folder: made where it is not.
        schema: of the rows; a job that is there must have the same.
        keys_of: sort keys of a table.
        anew: clear away a job that is there.

    Raises:
        BusyError: another process holds the folder, or the file in it.
        FormatError: the folder holds a job with another schema, or is broken.
        OSError: the folder cannot be made or written.
    """

    def __init__(
        self,
        folder: Path,
        schema: pa.Schema,
        keys_of: Callable[[pa.Table | pa.RecordBatch], Keys],
        *,
        anew: bool = False,
    ) -> None:
        self.folder = folder
        self.schema = schema
        self.loose = (0, 0)
        """(rows, bytes) of batches as they came."""
        self.packed = (0, 0)
        """The same of packed ones: a measure of what the finished file will take."""
        self._keys_of = keys_of
        self._path = folder / job_file.FILE
        self._lock = lock_folder(folder)
        try:
            self._begin(anew)
        except BaseException:
            self._lock.release()
            raise

    def append(self, batch: pa.RecordBatch) -> None:
        """Store a batch of rows; it is on disk when this returns.

        Raises:
            OSError: the disk is full or failed. What was stored before is safe. This batch may be
                stored or not; to append it again does no harm.
            BusyError: another program holds the file. As above.
        """
        if not batch.num_rows:
            return
        data = batch.serialize().to_pybytes()
        with self._transaction():
            self._insert(data, batch, packed=False)
        self.loose = (self.loose[0] + batch.num_rows, self.loose[1] + len(data))
        if self.loose[0] >= PACKED_ROWS or self.loose[1] >= PACKED_BYTES:
            self._pack()

    def stored(self) -> Iterator[tuple[Keys, NDArray[np.bool_]]]:
        """(keys, which are failures) of all rows, in order."""
        last = np.iinfo(np.int64).min
        while True:
            with job_file.sqlite_errors(self._path):
                found = self._connection.execute(
                    "SELECT key, failed FROM completions JOIN batches ON id = batch "
                    "WHERE key > ? ORDER BY key LIMIT 65536",
                    (int(last),),
                ).fetchall()
            if not found:
                return
            keys, failed = np.array(found, np.int64).T
            last = keys[-1]
            yield keys, failed.astype(np.bool_)

    def __len__(self) -> int:
        with job_file.sqlite_errors(self._path):
            return _count(self._connection)

    def merged(self, base: Iterable[pa.Table] = ()) -> Iterator[pa.Table]:
        """All rows, sorted; those stored take the place of rows of `base`, which is sorted.

        Raises:
            FormatError: as `beside`.
        """
        for old, new in self.beside(base):
            if len(old) and len(new):
                both = pa.concat_tables([old, new])
                yield both.take(latest(self._keys_of(both)))
            else:
                yield new if len(new) else old

    def beside(self, base: Iterable[pa.Table]) -> Iterator[tuple[pa.Table, pa.Table]]:
        """The tables of `base`, which is sorted, each with the stored rows up to its last one; in
        the end, those beyond, with empty tables.

        Raises:
            FormatError: `base` is not sorted, has a row twice, or the job's file was damaged.
        """
        newer = self._checked()
        keys, rows = np.empty(0, np.int64), self.schema.empty_table()
        last = -1
        for old in base:
            own = self._keys_of(old)
            _check_order(old, own, last)
            last = int(own[-1])
            while not len(keys) or keys[-1] <= last:
                more = next(newer, None)
                if more is None:
                    break
                keys, rows = np.concatenate([keys, more[0]]), pa.concat_tables([rows, more[1]])
            size = int(np.searchsorted(keys, last, side="right"))
            yield old, rows.slice(0, size)
            keys, rows = keys[size:], rows.slice(size)
        nothing = self.schema.empty_table()
        if len(keys):
            yield nothing, rows
        for _, table in newer:
            yield nothing, table

    def close(self) -> None:
        """Let go of the file and the folder. Idempotent."""
        if self._lock.is_locked:
            try:
                self._connection.close()
            finally:
                self._lock.release()

    def remove(self) -> None:
        """Delete the folder: its rows are elsewhere now."""
        self._connection.close()
        self._sweep()
        (self.folder / "_lock").unlink()
        # Whoever came for the next job just now has a lock of its own there.
        with contextlib.suppress(OSError):
            self.folder.rmdir()
        self._lock.release()

    def _begin(self, anew: bool) -> None:
        known = read_schema(self.folder)
        if known is None or anew:
            self._sweep()
        elif not known.equals(self.schema, check_metadata=False):
            raise FormatError(f"{self.folder}: its rows have other columns than this job's")
        self._connection = job_file.open_job(self._path, self.schema, begin=known is None or anew)
        if known is not None and known.metadata != self.schema.metadata:
            # The same job, asked for more.
            with self._transaction():
                data = self.schema.serialize().to_pybytes()
                self._connection.execute("UPDATE job SET schema = ?", (data,))
        sync_folder(self.folder)
        sync_folder(self.folder.parent)
        with job_file.sqlite_errors(self._path):
            query = "SELECT packed, sum(rows), sum(length(data)) FROM batches GROUP BY packed"
            sizes = {packed: (rows, size) for packed, rows, size in self._connection.execute(query)}
        self.loose, self.packed = sizes.get(0, (0, 0)), sizes.get(1, (0, 0))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with job_file.sqlite_errors(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise

    def _insert(self, data: bytes, batch: pa.Table | pa.RecordBatch, *, packed: bool) -> None:
        number = self._connection.execute(
            "INSERT INTO batches (rows, packed, crc32, data) VALUES (?, ?, ?, ?)",
            (batch.num_rows, packed, zlib.crc32(data), data),
        ).lastrowid
        keys, failed = self._keys_of(batch).tolist(), failed_rows(batch).tolist()
        self._connection.executemany(
            "INSERT OR REPLACE INTO completions VALUES (?, ?, ?, ?)",
            zip(keys, failed, itertools.repeat(number), range(len(keys)), strict=False),
        )

    def _pack(self) -> None:
        """Make one compressed batch, sorted, of those that came since the last time."""
        prefix = self.schema.serialize().to_pybytes()
        with self._transaction():
            loose = self._connection.execute(
                "SELECT id, crc32, data FROM batches WHERE NOT packed ORDER BY id"
            )
            buffers = (pa.py_buffer(job_file.intact(self._path, *each)) for each in loose)
            batches = [pa.ipc.read_record_batch(buffer, self.schema) for buffer in buffers]
            table = pa.Table.from_batches(batches)
            table = table.take(latest(self._keys_of(table))).combine_chunks()
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, self.schema, options=_COMPRESSED) as stream:
                stream.write_table(table)
            data = sink.getvalue().to_pybytes()[len(prefix) :]
            self._insert(data, table, packed=True)
            # Last, so that the new one's number is above theirs: none is given twice.
            self._connection.execute("DELETE FROM batches WHERE NOT packed")
        self.packed = (self.packed[0] + len(table), self.packed[1] + len(data))
        self.loose = (0, 0)

    def _checked(self) -> Iterator[tuple[Keys, pa.Table]]:
        """(keys, rows) in order, if the rows are those that the keys say."""
        for keys, failed, table in _ordered(self._connection, self._path, self.schema, None):
            same = np.array_equal(self._keys_of(table), keys)
            if not same or not np.array_equal(failed_rows(table), failed):
                raise job_file.damaged(self._path, "rows are not where their keys say")
            yield keys, table

    def _sweep(self) -> None:
        """Clear away what a job left that ended before its file was whole, or after it was."""
        # First: the others are nothing without it.
        self._path.unlink(missing_ok=True)
        sync_folder(self.folder)
        for path in self.folder.iterdir():
            if job_file.OURS.fullmatch(path.name) and path.name != "_lock" and path.is_file():
                os.unlink(path)


def latest(keys: Keys) -> NDArray[np.intp]:
    """Where rows with these keys [N] are to be taken from to be in order: [M] places, of rows with
    the same key the last."""
    order = np.argsort(keys, kind="stable")
    last = np.ones(len(keys), bool)
    last[:-1] = np.diff(keys[order]) != 0
    return order[last]


def _check_order(table: pa.Table, keys: Keys, last: int) -> None:
    wrong = np.flatnonzero(np.diff(keys, prepend=last) <= 0)
    if len(wrong):
        data_idx, sample_idx = (table.column(c)[int(wrong[0])] for c in KEY_COLUMNS)
        raise FormatError(
            f"the row with data_idx {data_idx} and sample_idx {sample_idx} stands behind a later "
            "one, or is there twice: rows of a file stand in the order of their job. "
            "Sort them, or begin anew"
        )


def _count(connection: sqlite3.Connection) -> int:
    query = "SELECT count(*) FROM completions JOIN batches ON id = batch"
    return int(connection.execute(query).fetchone()[0])


def _ordered(
    connection: sqlite3.Connection, path: Path, schema: pa.Schema, columns: list[str] | None
) -> Iterator[tuple[Keys, NDArray[np.bool_], pa.Table]]:
    """(keys, which are failures, rows) in order of the keys, some megabytes at a time. Nothing is
    locked in between: a batch never changes, and the next query finds where its rows are then."""
    prefix = schema.serialize().to_pybytes()
    fields = None if columns is None else [schema.get_field_index(name) for name in columns]
    options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=fields)

    @functools.lru_cache(_OPEN_BATCHES)
    def batch(number: int) -> pa.Table:
        query = "SELECT id, crc32, data FROM batches WHERE id = ?"
        return _decoded(path, prefix, connection.execute(query, (number,)).fetchone(), options)

    last = np.iinfo(np.int64).min
    while True:
        with job_file.sqlite_errors(path):
            connection.execute("BEGIN")  # until its end, the batches that are named are there
            try:
                found = connection.execute(
                    "SELECT key, failed, batch, row, length(data) / rows FROM completions "
                    "JOIN batches ON id = batch WHERE key > ? ORDER BY key LIMIT ?",
                    (int(last), _READ_ROWS),
                ).fetchall()
                if not found:
                    return
                keys, failed, numbers, rows, sizes = np.array(found, np.int64).T
                count = max(1, int(np.searchsorted(np.cumsum(sizes), _READ_BYTES)))
                table = _gathered(batch, numbers[:count], rows[:count])
            except (TypeError, IndexError, OverflowError, pa.ArrowException) as error:
                raise job_file.damaged(path, error) from error
            finally:
                connection.execute("COMMIT")
        last = keys[count - 1]
        yield (
            keys[:count],
            failed[:count].astype(np.bool_),
            table if columns is None else table.select(columns),
        )


def _gathered(batch: Callable[[int], pa.Table], numbers: Keys, rows: Keys) -> pa.Table:
    """Row `rows[i]` of the batch `numbers[i]`, for all i."""
    order = np.argsort(numbers, kind="stable")
    pieces = []
    for places in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
        table, wanted = batch(int(numbers[places[0]])), rows[places]
        together = (np.diff(wanted) == 1).all()
        pieces.append(table.slice(wanted[0], len(wanted)) if together else table.take(wanted))
    both = pa.concat_tables(pieces)
    return both if (np.diff(order) == 1).all() else both.take(np.argsort(order))


def _decoded(
    path: Path,
    prefix: bytes,
    batch: tuple[int, int, bytes],
    options: pa.ipc.IpcReadOptions,
) -> pa.Table:
    data = prefix + job_file.intact(path, *batch)
    try:
        return pa.ipc.open_stream(pa.py_buffer(data), options=options).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise job_file.damaged(path, error) from error
