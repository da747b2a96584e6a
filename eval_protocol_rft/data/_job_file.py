"""The SQLite file of an unfinished job: opened, looked over, and its errors as ours.

Invariant: nothing is done through a link, nothing of a file that no job wrote is changed, and what
was damaged is never taken for data.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from eval_protocol_rft._durable import DurableFile
from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.data._format import FormatError

logger = logging.getLogger(__name__)

FILE = "job.sqlite"
OURS = re.compile(r"_lock|_probe|job\.sqlite(-wal|-shm|-journal)?")
"""Names of files that a job writes."""
_APPLICATION = 0x45505246
"""SQLite's `application_id`: the file is one of these."""
_VERSION = 1
_TABLES = f"""
BEGIN;
CREATE TABLE job (schema BLOB NOT NULL);
CREATE TABLE batches (
    id INTEGER PRIMARY KEY, rows INTEGER NOT NULL, packed INTEGER NOT NULL,
    crc32 INTEGER NOT NULL, data BLOB NOT NULL
);
CREATE TABLE completions (
    key INTEGER PRIMARY KEY, failed INTEGER NOT NULL, batch INTEGER NOT NULL, row INTEGER NOT NULL
);
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
"""
_CHECKPOINT_PAGES = 250
"""The write-ahead log starts over from a megabyte on, for small disks."""
_CACHE_KIB = 8000
"""Holds the batches that are packed next: read again, they would cost a tenth of a millisecond."""
_PATIENCE = 60.0
"""Seconds to wait for another program that holds the file: a backup, or a person's own."""
_SHARED = re.compile(
    r"nfs\d?|cifs|smb\w*|9p|afs|beegfs|ceph|gfs2|gpfs|lustre|ocfs2|virtiofs|fuse\..*"
)
"""File systems that several hosts may have, which share no memory for a log's index."""


class BusyError(EvalProtocolRftError, RuntimeError):
    """Another process works on the same output."""


def open_job(path: Path, schema: pa.Schema, *, begin: bool) -> sqlite3.Connection:
    """Open the file to write, or begin it; the caller keeps all others off.

    Raises:
        FormatError: it was damaged, or is a link.
        BusyError: another program holds it.
        OSError: it cannot be written.
    """
    with sqlite_errors(path):
        if begin:
            with contextlib.closing(_connect(path, "mode=rwc")) as new:
                new.executescript(_TABLES)
                new.execute("INSERT INTO job VALUES (?)", (schema.serialize().to_pybytes(),))
                new.execute("COMMIT")
        connection = _journaled(path)
        if not begin:
            try:
                _look_over(connection, path)
            except BaseException:
                connection.close()
                raise
        return connection


@contextlib.contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to read with. No read-only one, which could not read what a killed writer left
    in its log or journal, and leaves files of its own behind."""
    with sqlite_errors(path):
        try:
            connection = _opened(path, "mode=rw")
        except sqlite3.OperationalError as error:
            if not path.exists():
                gone = f"{path}: gone: the job was finished meanwhile, or moved"
                raise FormatError(gone) from error
            log = path.with_name(f"{FILE}-wal")
            if log.is_file() and log.stat().st_size:
                raise
            # Where not even the log's index can be made, nobody writes.
            connection = _opened(path, "immutable=1")
        with contextlib.closing(connection):
            yield connection


def schema_of(path: Path) -> pa.Schema | None:
    """What the job was asked to do; None where the file is not there, or was not begun.

    Raises:
        FormatError: it is of no job, of another release's, or damaged.
    """
    refuse_link(path)
    if not path.is_file() or not path.stat().st_size:
        return None
    with reading(path) as connection:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not application and not tables:
            return None
        if application != _APPLICATION:
            raise FormatError(f"{path}: no job wrote this: move it, or choose another output")
        if version != _VERSION:
            raise FormatError(
                f"{path}: version {version} of such files, and this release reads {_VERSION}: "
                f"finish the job with the other one, or move {path.parent} away to begin it anew"
            )
        (data,) = connection.execute("SELECT schema FROM job").fetchone() or (None,)
    try:
        return pa.ipc.read_schema(pa.py_buffer(data))
    except (pa.ArrowInvalid, OSError, TypeError) as error:
        raise damaged(path, error) from error


def intact(path: Path, number: int, crc32: int, data: bytes) -> bytes:
    """The data of a batch.

    Raises:
        FormatError: it was damaged.
    """
    if not isinstance(data, bytes) or zlib.crc32(data) != crc32:
        remedy = f"DELETE FROM batches WHERE id = {number}"  # noqa: S608 - for a person to read
        raise FormatError(
            f"{path}: the stored batch {number} was damaged. Delete it with any SQLite client "
            f"({remedy}): the rest goes on, and what was in it is done again"
        )
    return data


def damaged(path: Path, why: object) -> FormatError:
    return FormatError(
        f"{path}: damaged ({why}), so what was stored is unknown: move {path.parent} away to begin "
        "it anew"
    )


@contextlib.contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """What SQLite raises within, as an error that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
            raise BusyError(
                f"{path}: another program holds it ({error}): end that, and run the same command "
                "again"
            ) from error
        if code == sqlite3.SQLITE_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path)) from error
        if code not in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            raise damaged(path, error) from error
        _ask_why(path)
        reason = f"{os.strerror(errno.EIO)} ({error})"
        raise OSError(errno.EIO, reason, os.fspath(path)) from error


def _ask_why(path: Path) -> None:
    """Raise what the system says of writing once more; SQLite does not tell."""
    probe = path.with_name("_probe")
    sizes = [file.stat().st_size for file in path.parent.glob(f"{FILE}*") if file.is_file()]
    try:
        with DurableFile(probe, keep=max(sizes, default=0)) as file:
            file.write(bytes(1 << 16))
            file.sync()
    except OSError as error:
        error.filename = os.fspath(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            os.unlink(probe)


def _connect(path: Path, how: str) -> sqlite3.Connection:
    refuse_link(path)
    uri = f"{path.absolute().as_uri()}?{how}"
    return sqlite3.connect(
        uri, uri=True, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
    )


def _opened(path: Path, how: str) -> sqlite3.Connection:
    """A connection that can read."""
    connection = _connect(path, how)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _journaled(path: Path) -> sqlite3.Connection:
    """A connection whose commits are on disk, by a write-ahead log, with which readers and the
    writer do not wait for each other, or, where there can be none, by a rollback journal."""
    why = _shared_file_system(path.parent)
    if why is None:
        connection = _connect(path, "mode=rw")
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
            connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            connection.execute("SELECT schema FROM job").fetchone()
            if mode == "wal":
                return connection
            why = f"its journal is {mode}"
        except sqlite3.OperationalError as error:
            why = str(error)
        connection.close()
    connection = _connect(path, "mode=rw")
    # Exclusive, a log that is there is read without the index that cannot be made.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("PRAGMA journal_mode = TRUNCATE")
    connection.execute("PRAGMA locking_mode = NORMAL")
    connection.execute("PRAGMA synchronous = FULL")
    logger.warning(
        "%s: SQLite has no write-ahead log there (%s) and keeps a rollback journal: as safe, but "
        "slower, and while somebody reads, the job waits",
        path,
        why,
    )
    return connection


def _shared_file_system(folder: Path) -> str | None:
    """The kind of the file system of `folder`, if several hosts may have it."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:  # no Linux
        return None
    for fields in map(str.split, mounts):
        kind = fields[fields.index("-") + 1]
        if fields[2] == number and _SHARED.fullmatch(kind):
            return kind
    return None


def _look_over(connection: sqlite3.Connection, path: Path) -> None:
    """See that all that is stored can be read, before more is added."""
    (problem,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if problem != "ok":
        raise damaged(path, " ".join(problem.split()))
    for batch in connection.execute("SELECT id, crc32, data FROM batches"):
        intact(path, *batch)


def refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise FormatError(
            f"{path} is a link, and a job keeps its files in a folder of its own: delete the link, "
            "or choose another output"
        )
