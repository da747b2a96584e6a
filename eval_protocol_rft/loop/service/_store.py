"""What the service remembers: small resources by kind and name, in one SQLite file.

Invariant: what `put` or `delete` returned from survives the death of the process, and a `change` is
there whole or not at all. Only one process writes: a second one is refused at the start.
"""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from eval_protocol_rft._errors import EvalProtocolRftError

Resource = dict[str, Any]
"""As the service sends it; names that begin with `_` are not sent."""

_LAYOUT = 1
"""Of the database; a folder of another one is refused."""
_TABLES = """
CREATE TABLE IF NOT EXISTS resources (
    place INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    value BLOB NOT NULL,
    UNIQUE (kind, name)
);
"""


class StateError(EvalProtocolRftError, RuntimeError):
    """The state folder cannot be used; the message says why and what to do."""


class Store:
    """Resources in the order in which they were made. Safe to call from any thread; each call takes
    well under a millisecond.

    Raises:
        StateError: the folder cannot be made, is used by another process, or was written by another
            version.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(
                f"{folder} cannot be a folder for the state ({error.strerror}): name another "
                "--state folder"
            ) from error
        self.folder = folder
        self._lock = threading.RLock()
        self._claim = _claim(folder)
        try:
            self._db = sqlite3.connect(folder / "state.sqlite", check_same_thread=False)
            self._open()
        except sqlite3.DatabaseError as error:
            self._claim.close()
            raise StateError(
                f"{folder / 'state.sqlite'} cannot be read ({error}): name another --state folder, "
                "or delete this one"
            ) from error
        except StateError:
            self._claim.close()
            raise

    def _open(self) -> None:
        self._db.isolation_level = None
        self._db.execute("PRAGMA journal_mode=WAL")
        # Nothing that was committed is lost when the process dies; a power cut may lose the end.
        self._db.execute("PRAGMA synchronous=NORMAL")
        (layout,) = self._db.execute("PRAGMA user_version").fetchone()
        if layout not in (0, _LAYOUT):
            raise StateError(
                f"{self.folder} was written by another version of this program: name another "
                "--state folder, or delete this one"
            )
        self._db.executescript(_TABLES)
        self._db.execute(f"PRAGMA user_version={_LAYOUT}")

    @contextlib.contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """All that is done inside happens, or, where it raises, none of it. Changes may nest."""
        with self._lock:
            if self._db.in_transaction:
                yield self._db
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def get(self, kind: str, name: str) -> Resource | None:
        """A copy of what is there."""
        with self._lock:
            row = self._db.execute(
                "SELECT value FROM resources WHERE kind = ? AND name = ?", (kind, name)
            ).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=Resource)

    def put(self, kind: str, name: str, value: Resource) -> None:
        """Make it, or put `value` in its place."""
        data = msgspec.json.encode(value)
        with self.change() as db:
            db.execute(
                "INSERT INTO resources (kind, name, value) VALUES (?, ?, ?) "
                "ON CONFLICT (kind, name) DO UPDATE SET value = excluded.value",
                (kind, name, data),
            )

    def delete(self, kind: str, name: str) -> bool:
        """Whether it was there."""
        with self.change() as db:
            found = db.execute("DELETE FROM resources WHERE kind = ? AND name = ?", (kind, name))
            return found.rowcount > 0

    def list(self, kind: str, prefix: str = "") -> list[Resource]:
        """Those whose name begins with `prefix`, oldest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT value FROM resources WHERE kind = ? AND substr(name, 1, ?) = ? "
                "ORDER BY place",
                (kind, len(prefix), prefix),
            ).fetchall()
        return [msgspec.json.decode(value, type=Resource) for (value,) in rows]

    def names(self, kind: str) -> Sequence[str]:
        """Oldest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT name FROM resources WHERE kind = ? ORDER BY place", (kind,)
            ).fetchall()
        return [name for (name,) in rows]

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._db.close()
            self._claim.close()


def _claim(folder: Path) -> Any:
    """The open file whose lock says that the folder is in use; the system drops it with the
    process, however that ends."""
    file = (folder / "lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise StateError(
            f"{folder} is in use by another server: stop that one, or name another --state folder"
        ) from error
    return file
