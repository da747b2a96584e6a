"""The calls that change a model in training, in their order, on disk.

Invariant: a call is on disk before its future's name is answered, and its answer together with all
that it made. Sent twice, a call is one call. So a model whose process died is rebuilt: its last
saved state, and the calls after it that changed it once more. The content of a call stays for as
long as that may be, and no longer.
"""

from __future__ import annotations

import hashlib
import sqlite3
from typing import NamedTuple

from eval_protocol_rft.loop.service._errors import Code, ServiceError
from eval_protocol_rft.loop.service._store import Store

KEPT = 500
"""Calls of a model whose answers can still be asked for, once their content is not needed."""
_TABLE = """
CREATE TABLE IF NOT EXISTS operations (
    model TEXT NOT NULL,
    seq INTEGER NOT NULL,
    name TEXT NOT NULL,
    digest BLOB NOT NULL,
    body BLOB,
    answer BLOB,
    PRIMARY KEY (model, seq)
) WITHOUT ROWID
"""


class Operation(NamedTuple):
    """One call of a model."""

    seq: int
    """From 1, in the order in which calls are carried out."""
    name: str
    body: bytes


class Operations:
    """Calls by model and number. Each method is one transaction."""

    def __init__(self, store: Store) -> None:
        self._store = store
        with store.change() as db:
            db.execute(_TABLE)

    def add(self, model: str, seq: int | None, name: str, body: bytes) -> int:
        """Put a call at its place; returns that.

        Args:
            seq: None takes the next one.

        Raises:
            ServiceError: another call has this place; with the code `GONE`, it was carried out so
                long ago that nothing is known of it.
        """
        digest = hashlib.blake2b(body, digest_size=16, key=name.encode()[:64]).digest()
        with self._store.change() as db:
            if seq is None:
                (last,) = db.execute(
                    "SELECT coalesce(max(seq), 0) FROM operations WHERE model = ?", (model,)
                ).fetchone()
                seq = last + 1
            row = db.execute(
                "SELECT digest FROM operations WHERE model = ? AND seq = ?", (model, seq)
            ).fetchone()
            if row is not None and row[0] != digest:
                raise ServiceError(
                    f"{model} was sent another call with seq_id {seq}", code=Code.ALREADY_EXISTS
                )
            if row is None and seq <= self.last_answered(model):
                raise ServiceError(
                    f"call {seq} of {model} was carried out long ago", code=Code.GONE
                )
            if row is None:
                db.execute(
                    "INSERT INTO operations (model, seq, name, digest, body) "
                    "VALUES (?, ?, ?, ?, ?)",
                    (model, seq, name, digest, body),
                )
        return seq

    def finish(self, model: str, seq: int, answer: bytes, *, again: bool) -> None:
        """Put down the answer of a call; `again`: a model that is rebuilt needs it once more."""
        with self._store.change() as db:
            db.execute(
                "UPDATE operations SET answer = ?, body = CASE WHEN ? THEN body END "
                "WHERE model = ? AND seq = ?",
                (answer, again, model, seq),
            )
            self._delete_old(db, model, seq)

    def answer(self, model: str, seq: int) -> bytes | None:
        """None: it is still to be carried out.

        Raises:
            ServiceError: there is no such call; with the code `GONE`, not any more.
        """
        with self._store.change() as db:
            row = db.execute(
                "SELECT answer FROM operations WHERE model = ? AND seq = ?", (model, seq)
            ).fetchone()
        if row is None and 0 < seq <= self.last_answered(model):
            raise ServiceError(f"the answer of call {seq} of {model} has expired", code=Code.GONE)
        if row is None:
            raise ServiceError.not_found(f"call {seq} of {model}")
        return row[0]  # type: ignore[no-any-return]

    def waiting(self, model: str, seq: int) -> Operation | None:
        """The call at that place, if it was sent and not carried out."""
        with self._store.change() as db:
            row = db.execute(
                "SELECT seq, name, body FROM operations "
                "WHERE model = ? AND seq = ? AND answer IS NULL",
                (model, seq),
            ).fetchone()
        return None if row is None else Operation(*row)

    def answered(self, model: str, *, after: int = 0) -> list[Operation]:
        """In their order, those that must be carried out again."""
        with self._store.change() as db:
            rows = db.execute(
                "SELECT seq, name, body FROM operations "
                "WHERE model = ? AND seq > ? AND answer IS NOT NULL AND body IS NOT NULL "
                "ORDER BY seq",
                (model, after),
            ).fetchall()
        return [Operation(*row) for row in rows]

    def last_answered(self, model: str) -> int:
        with self._store.change() as db:
            (last,) = db.execute(
                "SELECT coalesce(max(seq), 0) FROM operations "
                "WHERE model = ? AND answer IS NOT NULL",
                (model,),
            ).fetchone()
        return int(last)

    def unfinished_models(self) -> list[str]:
        """Those with calls that are still to be carried out."""
        with self._store.change() as db:
            rows = db.execute("SELECT DISTINCT model FROM operations WHERE answer IS NULL")
            return [model for (model,) in rows.fetchall()]

    def forget(self, model: str, *, until: int) -> None:
        """The model's state after call `until` was saved: what led there is not needed again."""
        with self._store.change() as db:
            db.execute(
                "UPDATE operations SET body = NULL WHERE model = ? AND seq <= ?", (model, until)
            )
            self._delete_old(db, model, until)

    def _delete_old(self, db: sqlite3.Connection, model: str, seq: int) -> None:
        db.execute(
            "DELETE FROM operations WHERE model = ? AND seq <= ? AND body IS NULL",
            (model, seq - KEPT),
        )

    def drop(self, model: str) -> None:
        """All of a model's."""
        with self._store.change() as db:
            db.execute("DELETE FROM operations WHERE model = ?", (model,))
