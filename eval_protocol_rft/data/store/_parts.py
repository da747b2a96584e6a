"""The folder of an unfinished job: parts, a journal, and what the job was asked to do.

Invariant: at any moment, what `append` returned for can be read from here or from the finished
file. A row that was appended twice counts once, the later one. One process at a time works here.
Only what a job wrote is deleted: files of its names, and never through a link.

    rollouts.parquet.parts/
      _schema               Arrow schema with the job's metadata; without it the others are garbage
      _lock                 held by the process that writes
      part-000000.parquet   sorted rows, complete
      _journal-000001       rows of the part that is being filled

A part is complete before the next journal is begun, and that is there before the part's own journal
goes. Where a part and its journal are both there, rows of the journal count: it may have gone on
after a part that could not be finished. When the job is finished, `_schema` goes before the parts
do, so that no half of them is taken for a job.

An append-only file of Arrow batches: where finished completions go first.

Invariant: what `append` returned for is on disk. A frame that a crash cut off, or filled with
something else, ends the journal: reading stops before it, and it is cut away before the next
append.

A frame is the magic `EPRJ`, the length of the payload and its CRC-32 (both little-endian uint32),
and the payload: one Arrow IPC record batch message, without its schema.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa

from eval_protocol_rft._durable import DurableFile, link_target, replacing, sync_folder, write_whole
from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.data.rollouts._format import METADATA_KEY, FormatError
from eval_protocol_rft.data.rollouts._parquet import (
    ROW_GROUP_ROWS,
    ROW_GROUP_TOKENS,
    count_tokens,
    open_parquet,
    read_row_groups,
    write_tables,
)
from eval_protocol_rft.data.store._merge import KEY_COLUMNS, Keys, SortedInput, latest, merge_sorted

_HEADER = struct.Struct("<4sII")
_MAGIC = b"EPRJ"


class Journal:
    """One journal file, open for appending after what it held."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.batches: list[pa.RecordBatch] = []
        """What the file holds, in order of appending."""
        keep = 0
        if path.exists():
            self.batches, keep = read_journal(path.read_bytes(), schema)
        self._file = DurableFile(path, keep=keep)

    def append(self, batch: pa.RecordBatch) -> None:
        """Add a batch, and wait until it is on disk.

        Raises:
            OSError: the disk is full or failed; the journal is as it was.
        """
        payload = batch.serialize()
        end = self._file.tell()
        self._file.write(_HEADER.pack(_MAGIC, payload.size, zlib.crc32(payload)) + bytes(payload))
        try:
            self._file.sync()
        except OSError:
            self._file.cut(end)
            raise
        self.batches.append(batch)

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Delete the file: its rows are elsewhere now."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def read_journal(data: bytes, schema: pa.Schema) -> tuple[list[pa.RecordBatch], int]:
    """The whole frames at the start of `data`, and how many bytes they take."""
    batches: list[pa.RecordBatch] = []
    start = 0
    while len(data) - start >= _HEADER.size:
        magic, size, checksum = _HEADER.unpack_from(data, start)
        payload = data[start + _HEADER.size : start + _HEADER.size + size]
        # An empty payload would match a header whose rest is zeros, which a power cut can leave.
        if magic != _MAGIC or not payload or len(payload) != size:
            break
        if zlib.crc32(payload) != checksum:
            break
        batches.append(pa.ipc.read_record_batch(pa.py_buffer(payload), schema))
        start += _HEADER.size + size
    return batches, start


_OURS = re.compile(
    r"_lock|_schema|_journal-(\d{6,})|part-(\d{6,})\.parquet"
    r"|\.(_schema|part-\d{6,}\.parquet)\.\d+\.tmp"
)
"""Names of files that a job writes."""


class BusyError(EvalProtocolRftError, RuntimeError):
    """Another process works on the same output."""


def parts_folder(output: Path, column: str | None = None) -> Path:
    """Where the unfinished job for `output` lies; with `column`, the one that scores it."""
    target = link_target(output)
    middle = "" if column is None else f".{column}"
    return target.with_name(f"{target.name}{middle}.parts")


def lock_folder(folder: Path) -> filelock.BaseFileLock:
    """Make `folder` where it is not, and hold it.

    Raises:
        BusyError: another process holds it.
        FormatError: it, or a job's file in it, is a link, and what that leads to is not ours.
        OSError: it cannot be made.
    """
    _refuse_link(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name):
            _refuse_link(path)
    lock = filelock.FileLock(folder / "_lock", timeout=0, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BusyError(
            f"{folder}: another process is writing here; wait for it, or stop it"
        ) from None
    return lock


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
        raise FormatError(
            f"{folder / '_schema'}: broken, so what the job was is unknown: move {folder} away to "
            f"begin it anew ({error})"
        ) from error


def part_paths(folder: Path) -> list[Path]:
    """The complete parts, in order of writing."""
    return [path for path in _job_files(folder) if path.name.startswith("part-")]


def journal_tables(folder: Path, schema: pa.Schema) -> list[tuple[int, pa.Table]]:
    """What the journals in `folder` hold, with their numbers, whoever may be writing there. To see
    all rows, read these first and the parts then: a part is complete before its journal goes."""
    tables = []
    for path in _job_files(folder):
        if path.name.startswith("_journal-"):
            with contextlib.suppress(FileNotFoundError):
                batches, _ = read_journal(path.read_bytes(), schema)
                if batches:
                    tables.append((part_number(path), pa.Table.from_batches(batches, schema)))
    return tables


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
        self._sizes: dict[int, tuple[int, int]] = {}
        """Number of a complete part -> (rows, bytes)."""
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

    def in_parts(self) -> tuple[int, int]:
        """(rows, bytes) of the complete parts."""
        rows, sizes = zip(*self._sizes.values(), strict=True) if self._sizes else ((), ())
        return sum(rows), sum(sizes)

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
            for path in part_paths(self.folder):
                _refuse_foreign_part(path)
            self._sweep()
            write_whole(self.folder / "_schema", self.schema.serialize())
            sync_folder(self.folder.parent)
        elif not known.equals(self.schema, check_metadata=False):
            raise FormatError(f"{self.folder}: its rows have other columns than this job's")
        for path in _job_files(self.folder):
            if path.name.startswith("."):
                os.unlink(path)
        for path in part_paths(self.folder):
            with contextlib.suppress(FormatError), open_parquet(path) as file:
                self._sizes[part_number(path)] = file.metadata.num_rows, path.stat().st_size
        for path in [path for path in _job_files(self.folder) if path.name.startswith("_journal-")]:
            with contextlib.closing(Journal(path, self.schema)) as journal:
                if journal.batches:
                    self._write_part(part_number(path), journal)
                journal.remove()
        self._open_journal(max(map(part_number, part_paths(self.folder)), default=-1) + 1)

    def _write_part(self, number: int, journal: Journal) -> None:
        path = self._part(number)
        tables = [pa.Table.from_batches(journal.batches, self.schema)]
        if path.exists():
            tables = [*read_row_groups(path), *tables]
        table = pa.concat_tables(tables)
        with replacing(path) as file:
            rows = write_tables(file, self.schema, [table.take(latest(self._keys_of(table)))])
            size = file.tell()
        self._sizes[number] = rows, size

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
        for path in _job_files(self.folder):
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


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise FormatError(
            f"{path} is a link, and a job keeps its files in a folder of its own: delete the link, "
            "or choose another output"
        )


def _refuse_foreign_part(path: Path) -> None:
    """A part without its job's `_schema`: either it was left by a job that had come to its end, or
    somebody has files of such names."""
    with open_parquet(path) as file:
        if not {METADATA_KEY, b"job"}.intersection(file.schema_arrow.metadata or {}):
            raise FormatError(f"{path}: no job wrote this: move it, or choose another output")


def _job_files(folder: Path) -> list[Path]:
    """What a job wrote into `folder`, by name."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if _OURS.fullmatch(path.name) and path.is_file() and not path.is_symlink()
    )


def part_number(path: Path) -> int:
    """Of a part or a journal."""
    return int(path.stem.rpartition("-")[2])
