"""Whether rows of a rollout file are what docs/format.md says. Pure, table by table, and without a
Python loop per row unless something is wrong, or they are episodes.

Invariant: no pair (`data_idx`, `sample_idx`) goes by twice, the completions of a data row go by
together, and token data that goes by can be trained on; else a `FormatError` names file and row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eval_protocol_rft.data.rollouts._episodes import checked_episode
from eval_protocol_rft.data.rollouts._format import (
    EPISODE_COLUMNS,
    FileMetadata,
    FormatError,
    json_kind,
)
from eval_protocol_rft.data.rollouts._rows import from_record_batch
from eval_protocol_rft.record import RecordError
from eval_protocol_rft.sampling import LOGPROB_NOISE, LOWEST_LOGPROB, token_data_problem

_Ints = NDArray[np.int64]
_NEEDED = ("response", "prompt_ids", "completion_ids", "logprobs", "finish_reason", "truncated")
"""What every completion that did not fail has."""


def in_order(tables: Iterable[pa.Table], where: str) -> Iterator[pa.Table]:
    """The same tables, of which none is empty.

    Args:
        tables: with `data_idx` and `sample_idx`.
        where: how messages call the file.

    Raises:
        FormatError: a completion stands there twice, or those of a data row are scattered.
    """
    seen = _DataRows(where)
    for table in tables:
        seen.add(*(np.asarray(table.column(name), np.int64) for name in ("data_idx", "sample_idx")))
        yield table


def with_token_data(tables: Iterable[pa.Table], where: str) -> Iterator[pa.Table]:
    """The same tables, of which none is empty.

    Raises:
        FormatError: a completion that did not fail lacks something, its arrays differ in length, or
            a number in them is no token id or no logprob to train on.
    """
    for table in tables:
        if _may_be_wrong(table):
            for row in table.select(_columns(table)).to_pylist():
                if problem := row["error"] is None and _problem(row):
                    raise FormatError(
                        f"{where}: data row {row['data_idx']}, completion {row['sample_idx']}: "
                        f"{problem}"
                    )
        if "turns" in table.schema.names:
            _check_episodes(table, where)
        yield table


def _check_episodes(table: pa.Table, where: str) -> None:
    """Look at the episodes of a table, one after the other."""
    episodes = table.filter(table.column("turns").is_valid())
    names = [name for name in table.schema.names if name in _OF_EPISODES]
    for row in from_record_batch(episodes.select(names), FileMetadata(), where=where):
        try:
            checked_episode(row)
        except RecordError as error:
            raise FormatError(
                f"{where}: data row {row.data_idx}, completion {row.sample_idx}: {error}"
            ) from error


_OF_EPISODES = frozenset(
    {"row_id", "data_idx", "sample_idx", "prompt", "error", *_NEEDED, *EPISODE_COLUMNS}
)


def with_json_text(
    tables: Iterable[pa.Table], where: str, further: Iterable[str] = ()
) -> Iterator[pa.Table]:
    """The same tables, of which none is empty.

    Args:
        further: columns of any JSON, beside those that the format has.

    Raises:
        FormatError: a column of JSON text holds something else.
    """
    anything = frozenset(further)
    for table in tables:
        for name in table.schema.names:
            kind = json_kind(name)
            if name in anything or kind is not None:
                _check_json(table, name, kind or object, where)
        yield table


def _check_json(table: pa.Table, name: str, kind: type, where: str) -> None:
    column = table.column(name)
    if column.null_count == len(column) or not pa.types.is_string(column.type):
        return
    good = None  # the same text for all completions of a data row, as a rule
    for row, text in enumerate(column.to_pylist()):
        if text is None or text == good:
            continue
        try:
            value = msgspec.json.decode(text)
            problem = None
        except (msgspec.DecodeError, RecursionError) as error:
            value, problem = None, f"is no JSON that can be read: {error}"
        if problem is None and not isinstance(value, kind | None):
            problem = f"is no JSON {'list' if kind is list else 'object'}"
        if problem is not None:
            place, sample = (table.column(n)[row].as_py() for n in ("data_idx", "sample_idx"))
            raise FormatError(f"{where}: data row {place}, completion {sample}: {name} {problem}")
        good = text


class _DataRows:
    """The data rows that went by, and the completions of the last one."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._last = -1
        self._highest = -1
        self._places: set[int] = set()
        self._runs: list[_Ints] = []
        self._seen: set[int] | None = None
        """All of them, once they do not come by ascending `data_idx`."""

    def add(self, data_idx: _Ints, sample_idx: _Ints) -> None:
        for name, numbers in (("data_idx", data_idx), ("sample_idx", sample_idx)):
            if (lowest := int(numbers.min())) < 0:
                raise FormatError(f"{self._where}: a row has the {name} {lowest}: they begin at 0")
        starts = np.flatnonzero(np.append(True, data_idx[1:] != data_idx[:-1]))
        goes_on = bool(data_idx[0] == self._last)
        self._add_rows(data_idx[starts[goes_on:]])
        within = data_idx[1:] == data_idx[:-1]
        if np.any(within & (np.diff(sample_idx) <= 0)):
            self._refuse_twice(data_idx, sample_idx)
        first = sample_idx[: starts[1]] if len(starts) > 1 else sample_idx
        if goes_on and not self._places.isdisjoint(again := first.tolist()):
            double = next(place for place in again if place in self._places)
            raise FormatError(self._twice(int(data_idx[0]), double))
        kept = self._places if goes_on and len(starts) == 1 else set()
        self._places = kept | set(sample_idx[starts[-1] :].tolist())
        self._last = int(data_idx[-1])

    def _add_rows(self, new: _Ints) -> None:
        if not len(new):
            return
        ascending = new[0] > self._highest and bool((np.diff(new) > 0).all())
        if self._seen is None and not ascending:
            self._seen = set(np.concatenate([*self._runs, new[:0]]).tolist())
            self._runs = []
        if self._seen is None:
            self._runs.append(new)
        else:
            for number in new.tolist():
                if number in self._seen:
                    raise FormatError(
                        f"{self._where}: the completions of data row {number} do not stand "
                        "together. Sort the file by data_idx and sample_idx"
                    )
                self._seen.add(number)
        self._highest = max(self._highest, int(new.max()))

    def _refuse_twice(self, data_idx: _Ints, sample_idx: _Ints) -> None:
        pairs, counts = np.unique(
            np.stack([data_idx, sample_idx], axis=1), axis=0, return_counts=True
        )
        if (counts > 1).any():
            raise FormatError(self._twice(*pairs[counts > 1][0].tolist()))

    def _twice(self, data_idx: int, sample_idx: int) -> str:
        return (
            f"{self._where}: data row {data_idx} has its completion {sample_idx} twice. Leave one "
            "of them out"
        )


def _may_be_wrong(table: pa.Table) -> bool:
    """Whether a row of the table may be wrong; false where none is."""
    survived = table.filter(pc.is_null(table.column("error")))
    if any(name not in survived.schema.names for name in _NEEDED):
        return bool(len(survived))
    if any(survived.column(name).null_count for name in _NEEDED):
        return True
    lengths = pc.list_value_length(survived.column("completion_ids"))
    raw = survived.column("raw_logprobs") if "raw_logprobs" in survived.schema.names else None
    return (
        bool(pc.any(pc.equal(lengths, 0)).as_py())
        or bool(pc.any(pc.equal(pc.list_value_length(survived.column("prompt_ids")), 0)).as_py())
        or _differs(lengths, pc.list_value_length(survived.column("logprobs")))
        or (raw is not None and _differs(lengths, pc.list_value_length(raw)))
        or any(_ids_outside(survived.column(name)) for name in ("prompt_ids", "completion_ids"))
        or any(_logprobs_outside(c) for c in (survived.column("logprobs"), raw) if c is not None)
        or not set(pc.unique(survived.column("finish_reason")).to_pylist()) <= {"stop", "length"}
    )


def _differs(lengths: pa.ChunkedArray, others: pa.ChunkedArray) -> bool:
    return bool(pc.any(pc.not_equal(lengths, others)).as_py())


def _ids_outside(column: pa.ChunkedArray) -> bool:
    values = pc.list_flatten(column)
    return bool(values.null_count) or bool(len(values) and pc.min(values).as_py() < 0)


def _logprobs_outside(column: pa.ChunkedArray) -> bool:
    values = pc.list_flatten(column)
    if values.null_count:
        return True
    numbers = values.to_numpy()
    return bool(len(numbers)) and not (  # NaN is the least and the greatest of its array
        numbers.min() >= LOWEST_LOGPROB and numbers.max() <= LOGPROB_NOISE
    )


def _columns(table: pa.Table) -> list[str]:
    wanted = ("data_idx", "sample_idx", "error", *_NEEDED, "raw_logprobs")
    return [name for name in wanted if name in table.schema.names]


def _problem(row: dict[str, object]) -> str | None:
    """Say what is wrong with the row of a completion that did not fail, or None."""
    for name in _NEEDED:
        if row.get(name) is None:
            return f"it has no {name}"
    for name in ("prompt_ids", "completion_ids", "logprobs", "raw_logprobs"):
        values = row.get(name)
        if isinstance(values, list) and None in values:
            return f"{name}[{values.index(None)}] is null"
    prompt, ids, logprobs = (row[name] for name in ("prompt_ids", "completion_ids", "logprobs"))
    assert isinstance(prompt, list)  # noqa: S101 - the column's type
    if not prompt:
        return "prompt_ids is empty"
    if min(prompt) < 0:
        index = next(i for i, token in enumerate(prompt) if token < 0)
        return f"prompt_ids[{index}] is {prompt[index]}: not a token id"
    if row["finish_reason"] not in ("stop", "length"):
        return f"finish_reason is {row['finish_reason']!r}, not 'stop' or 'length'"
    return token_data_problem(ids, logprobs, row.get("raw_logprobs"))  # type: ignore[arg-type]
