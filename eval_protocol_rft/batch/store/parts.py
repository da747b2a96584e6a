"""The folder of an unfinished job: parts, a journal, and what the job was asked to do.

Invariant: at any moment, what `append` returned for can be read from here or from the finished
file. A row that was appended twice counts once, the later one. One process at a time works here.

    rollouts.parquet.parts/
      _schema               Arrow schema with the job's metadata; without it the folder is garbage
      _lock                 held by the process that writes
      part-000000.parquet   sorted rows, complete
      _journal-000001       rows of the part that is being filled

A part is complete before the next journal is begun, and that is there before the part's own journal
goes. Where a part and its journal are both there, rows of the journal count: it may have gone on
after a part that could not be finished. When the job is finished, `_schema` goes before the parts
do, so that no half of them is taken for a job.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa

from eval_protocol_rft.batch.durable import replacing, sync_folder, write_whole
from eval_protocol_rft.batch.rollouts.format import FormatError
from eval_protocol_rft.batch.rollouts.parquet import (
    ROW_GROUP_ROWS,
    ROW_GROUP_TOKENS,
    count_tokens,
    read_row_groups,
    write_tables,
)
from eval_protocol_rft.batch.store.journal import Journal
from eval_protocol_rft.batch.store.merge import KEY_COLUMNS, Keys, SortedInput, latest, merge_sorted


class BusyError(RuntimeError):
    """Another process works on the same output."""


def parts_folder(output: Path) -> Path:
    """Where the unfinished job for `output` lies."""
    return output.with_name(output.name + ".parts")


def read_schema(folder: Path) -> pa.Schema | None:
    """What the job in `folder` was asked to do; None where there is no job.

    Raises:
        FormatError: it cannot be read.
    """
    try:
        data = (folder / "_schema").read_bytes()
    except FileNotFoundError:
        return None
    try:
        return pa.ipc.read_schema(pa.py_buffer(data))
    except (pa.ArrowInvalid, OSError) as error:
        raise FormatError(f"{folder / '_schema'}: broken: {error}") from error


def part_paths(folder: Path) -> list[Path]:
    """The complete parts, in order of writing."""
    return sorted(folder.glob("part-*.parquet"))


def stored_keys(table: pa.Table) -> tuple[Keys, Keys, Keys]:
    """(data_idx, sample_idx, 1 where it failed) of rows, from these columns and `error`."""
    data_idx, sample_idx = (np.asarray(table.column(name), np.int64) for name in KEY_COLUMNS)
    return data_idx, sample_idx, np.asarray(table.column("error").is_valid()).astype(np.int64)


class PartStore:
    """Rows on their way to a file.

    Args:
        folder: made where it is not.
        schema: of the rows; a job that is there must have the same.
        keys_of: sort keys of a table.
        anew: clear away a job that is there.

    Raises:
        BusyError: another process holds the folder.
        FormatError: the folder holds a job with another schema, or is broken.
        OSError: the folder cannot be made or written.
    """

    def __init__(
        self,
        folder: Path,
        schema: pa.Schema,
        keys_of: Callable[[pa.Table], Keys],
        *,
        anew: bool = False,
    ) -> None:
        self.folder = folder
        self.schema = schema
        self._keys_of = keys_of
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(folder / "_lock", timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise BusyError(
                f"{folder}: another process is writing here; wait for it, or stop it"
            ) from None
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
        """
        if not batch.num_rows:
            return
        self._journal.append(batch)
        self._rows += batch.num_rows
        self._tokens += count_tokens(batch)
        if self._rows >= ROW_GROUP_ROWS or self._tokens >= ROW_GROUP_TOKENS:
            self.seal()

    def seal(self) -> None:
        """Make a part of what the journal holds."""
        if self._rows:
            sealed = self._journal
            self._write_part(self._number, sealed)
            self._open_journal(self._number + 1)
            sealed.remove()

    def stored(self) -> Iterator[tuple[Keys, Keys, Keys]]:
        """(data_idx, sample_idx, 1 where it failed) of all rows, part by part, in order.

        Raises:
            FormatError: a part is broken; the others are not.
        """
        self.seal()
        for path in part_paths(self.folder):
            try:
                for table in read_row_groups(path, columns=[*KEY_COLUMNS, "error"]):
                    yield stored_keys(table)
            except FormatError as error:
                raise FormatError(
                    f"{error} Move it out of the folder: the rest goes on, and what was in it is "
                    "done again"
                ) from error

    @property
    def has_parts(self) -> bool:
        """Whether anything was stored."""
        self.seal()
        return bool(part_paths(self.folder))

    def merged(self, base: Sequence[SortedInput] = ()) -> Iterator[pa.Table]:
        """All rows, sorted; those of the parts take the place of rows of `base`."""
        self.seal()
        inputs = [self._input(path) for path in part_paths(self.folder)]
        yield from merge_sorted([*base, *inputs], self._keys_of)

    def close(self) -> None:
        """Seal what there is and let go of the folder. Idempotent.

        Raises:
            OSError: the part could not be written. Its rows stay in the journal, and are taken up
                when the folder is opened again.
        """
        if self._lock.is_locked:
            try:
                self.seal()
            finally:
                self._let_go()

    def remove(self) -> None:
        """Delete the folder: its rows are elsewhere now."""
        (self.folder / "_schema").unlink()
        sync_folder(self.folder)
        self._journal.close()
        self._sweep()
        (self.folder / "_lock").unlink()
        # Whoever came for the next job just now has a lock of its own there.
        with contextlib.suppress(OSError):
            self.folder.rmdir()
        self._lock.release()

    def _begin(self, anew: bool) -> None:
        known = None if anew else read_schema(self.folder)
        if known is None:
            self._sweep()
            write_whole(self.folder / "_schema", self.schema.serialize())
            sync_folder(self.folder.parent)
        elif not known.equals(self.schema, check_metadata=False):
            raise FormatError(f"{self.folder}: its rows have other columns than this job's")
        for stray in self.folder.glob(".*.tmp"):
            os.unlink(stray)
        for path in sorted(self.folder.glob("_journal-*")):
            with contextlib.closing(Journal(path, self.schema)) as journal:
                if journal.batches:
                    self._write_part(_number(path), journal)
                journal.remove()
        self._open_journal(max(map(_number, part_paths(self.folder)), default=-1) + 1)

    def _write_part(self, number: int, journal: Journal) -> None:
        path = self._part(number)
        tables = [pa.Table.from_batches(journal.batches, self.schema)]
        if path.exists():
            tables = [*read_row_groups(path), *tables]
        table = pa.concat_tables(tables)
        with replacing(path) as file:
            write_tables(file, self.schema, [table.take(latest(self._keys_of(table)))])

    def _open_journal(self, number: int) -> None:
        journal = Journal(self.folder / f"_journal-{number:06d}", self.schema)
        try:
            sync_folder(self.folder)
        except OSError:
            journal.close()
            raise
        self._journal, self._number = journal, number
        self._rows = self._tokens = 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.parquet"

    def _input(self, path: Path) -> SortedInput:
        first = next(read_row_groups(path, columns=KEY_COLUMNS))
        return SortedInput(int(self._keys_of(first)[0]), lambda: read_row_groups(path))

    def _sweep(self) -> None:
        """Clear away what a job left that ended before its folder was whole, or after its file
        was."""
        for path in self.folder.iterdir():
            if path.name != "_lock":
                os.unlink(path)

    def _let_go(self) -> None:
        try:
            if self._journal.batches:
                self._journal.close()
            else:
                self._journal.remove()
        finally:
            self._lock.release()


def _number(path: Path) -> int:
    """Of a part or a journal."""
    return int(path.stem.rpartition("-")[2])
