"""Sorted inputs that may overlap, as one sorted stream. Pure.

Invariant: every key of the inputs comes out once, in order; where several inputs have it, the last
of them counts. What is held at a time is the inputs' overlap, not the inputs. An input that is not
sorted is an error, since no row of it can be trusted to be in its place.

Which completions a job has, and which it still misses.

Invariant: one byte per completion asked for, whatever the completions hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eval_protocol_rft.data.rollouts._format import FormatError

KEY_COLUMNS = ["data_idx", "sample_idx"]
Keys = NDArray[np.int64]
_SAMPLE_BITS = 31


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


@dataclass(frozen=True, slots=True)
class SortedInput:
    """One input: where it starts, and how to read it."""

    first_key: int
    tables: Callable[[], Iterator[pa.Table]]
    """Its rows by ascending keys, each key once, in tables that are not empty."""


def latest(keys: Keys) -> NDArray[np.intp]:
    """Where rows with these keys [N] are to be taken from to be in order: [M] places, of rows with
    the same key the last."""
    order = np.argsort(keys, kind="stable")
    last = np.ones(len(keys), bool)
    last[:-1] = np.diff(keys[order]) != 0
    return order[last]


def merge_sorted(
    inputs: Sequence[SortedInput], keys_of: Callable[[pa.Table], Keys]
) -> Iterator[pa.Table]:
    """All rows by ascending key, in tables that are not empty.

    Raises:
        FormatError: an input is not sorted, or has a row twice.
    """
    waiting = sorted(range(len(inputs)), key=lambda i: inputs[i].first_key, reverse=True)
    running: dict[int, _Running] = {}
    pending = _Pending.empty()
    while waiting or running or pending.table is not None:
        # No key below `bound` can still come.
        bounds = [(inputs[i].first_key, i) for i in waiting[-1:]]
        bounds += [(run.last_key + 1, i) for i, run in running.items()]
        bound, slowest = min(bounds, default=(None, -1))
        done, pending = pending.split(bound)
        if done is not None:
            yield done
        if bound is None:
            continue
        if slowest not in running:
            waiting.pop()
            running[slowest] = _Running(inputs[slowest].tables(), -1)
        run = running[slowest]
        table = next(run.tables, None)
        if table is None:
            del running[slowest]
            continue
        keys = keys_of(table)
        _check_order(table, keys, run.last_key)
        running[slowest] = _Running(run.tables, int(keys[-1]))
        pending = pending.plus(table, keys, slowest)


def _check_order(table: pa.Table, keys: Keys, last: int) -> None:
    wrong = np.flatnonzero(np.diff(keys, prepend=last) <= 0)
    if len(wrong):
        data_idx, sample_idx = (table.column(c)[int(wrong[0])] for c in KEY_COLUMNS)
        raise FormatError(
            f"the row with data_idx {data_idx} and sample_idx {sample_idx} stands behind a later "
            "one, or is there twice: rows of a file stand in the order of their job. "
            "Sort them, or begin anew"
        )


@dataclass(frozen=True, slots=True)
class _Running:
    tables: Iterator[pa.Table]
    last_key: int
    """Of what was read; further keys are above it."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """Rows that were read and cannot go yet, sorted, each key once."""

    table: pa.Table | None
    keys: Keys
    sources: Keys
    """[N] which input a row came from."""

    @classmethod
    def empty(cls) -> _Pending:
        return cls(None, np.empty(0, np.int64), np.empty(0, np.int64))

    def plus(self, table: pa.Table, keys: Keys, source: int) -> _Pending:
        both = table if self.table is None else pa.concat_tables([self.table, table])
        keys = np.concatenate([self.keys, keys])
        sources = np.concatenate([self.sources, np.full(len(table), source)])
        order = np.lexsort((sources, keys))
        last = np.append(np.diff(keys[order]) != 0, True)
        order = order[last]
        in_place = len(order) == len(keys) and bool((np.diff(order) == 1).all())
        return _Pending(both if in_place else both.take(order), keys[order], sources[order])

    def split(self, bound: int | None) -> tuple[pa.Table | None, _Pending]:
        """What lies below `bound` (None: everything), and the rest."""
        if self.table is None:
            return None, self
        size = len(self.keys) if bound is None else int(np.searchsorted(self.keys, bound))
        if size == 0:
            return None, self
        if size == len(self.keys):
            return self.table, _Pending.empty()
        rest = _Pending(self.table.slice(size), self.keys[size:], self.sources[size:])
        return self.table.slice(0, size), rest


_MISSING, _DONE, _FAILED = 0, 1, 2


class DoneIndex:
    """The state of every (data_idx, sample_idx).

    Args:
        num_rows: of the data set.
        n: completions per row.
    """

    def __init__(self, num_rows: int, n: int) -> None:
        self._states = np.zeros((num_rows, n), np.uint8)

    def add(
        self, data_idx: NDArray[np.int64], sample_idx: NDArray[np.int64], failed: NDArray[np.int64]
    ) -> None:
        """Take up rows that are stored; later ones count."""
        self._states[data_idx, sample_idx] = np.where(failed, _FAILED, _DONE)

    def missing(self, data_idx: int, *, retry_failed: bool) -> list[int]:
        """The `sample_idx` that are to be sampled."""
        states = self._states[data_idx]
        wanted = states != _DONE if retry_failed else states == _MISSING
        return [int(i) for i in np.flatnonzero(wanted)]

    @property
    def done(self) -> int:
        """Completions that are there."""
        return int(np.count_nonzero(self._states == _DONE))

    @property
    def failed(self) -> int:
        return int(np.count_nonzero(self._states == _FAILED))
