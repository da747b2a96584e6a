"""`RolloutDataset`: a rollout file, read lazily.

Invariant: rows come in file order, no completion twice, and the completions of a data row stand
together, whatever the file's format and whether its job was finished; else a `FormatError` names
file and row. Only what is being looked at is in memory, and it is checked table by table, without a
Python loop per row unless something is wrong.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eval_protocol_rft.data import _format as file_format
from eval_protocol_rft.data import _job_store as job_store
from eval_protocol_rft.data import _jsonl as jsonl
from eval_protocol_rft.data._format import CompletionRow, FileMetadata, FormatError
from eval_protocol_rft.data._jsonl import METADATA_SUFFIX
from eval_protocol_rft.data._records import prompt_groups
from eval_protocol_rft.data._row_groups import from_record_batch, open_parquet, read_row_groups
from eval_protocol_rft.data._to_ep import to_rows
from eval_protocol_rft.data.source._arrow import plain_type
from eval_protocol_rft.data.source._places import called, one_place
from eval_protocol_rft.training import PromptGroup

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow


_NEEDED = ("row_id", "data_idx", "sample_idx", "prompt")
"""Columns that every file has, without a null."""
_TOLD = ("completion_ids", "truncated", "error")
"""Columns that every file has, without which a null would pass for an answer."""


class RolloutDataset:
    """The rollouts of a file: Parquet, JSON lines, or what an unfinished job has put aside.

    Args:
        path: the file. Where it is not there yet, what is stored of the job that is to write it,
            which may be running. Or a URL of `fsspec`, compressed JSON lines, or a pattern that one
            file has: of these, a copy is made as long as the object is there.

    Raises:
        FormatError: there is no such file, or it is no rollout file.
        SourceError: what is behind the URL or the pattern cannot be had.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._copy = contextlib.ExitStack()
        place = one_place(path)
        self.path = self._copy.enter_context(place.here(METADATA_SUFFIX))
        self.is_copy = not place.is_plain and self.path.exists()
        """Whether `path` is one, of what is behind a URL or compressed."""
        self.where = place.shown
        """For messages."""
        with called(self.path, self.where):
            self._open()

    def _open(self) -> None:
        self.finished = self.path.is_file()
        """False where this is what an unfinished job has so far."""
        folder = self.path if self.path.is_dir() else job_store.parts_folder(self.path)
        if self.finished:
            self.schema: pa.Schema = _file_schema(self.path)
        else:
            found = job_store.read_schema(folder)
            if found is None:
                raise FormatError(
                    f"{self.where}: no such rollout file, and no unfinished job for it"
                )
            self.schema = found
        needed = [*_NEEDED, *_TOLD]
        if not file_format.EPISODE_COLUMNS.keys().isdisjoint(self.schema.names):
            needed += file_format.EPISODE_COLUMNS
        missing = [name for name in needed if name not in self.schema.names]
        if missing:
            raise FormatError(f"{self.where}: no rollout file: it has no column {missing[0]!r}")
        self._folder = folder
        self.metadata: FileMetadata = file_format.metadata_of(self.schema, where=self.where)

    def __repr__(self) -> str:
        return f"RolloutDataset({self.where!r})"

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Arrow tables of the rows, none of them empty.

        Args:
            columns: read these alone; default all.

        Raises:
            FormatError: while iterating, at what is broken, at a completion that is there twice, or
                at a data row whose completions do not stand together.
        """
        further = self.metadata.json_columns
        tables = with_json_text(self._tables(_with_keys(columns)), self.where, further)
        return tables if columns is None else (table.select(columns) for table in tables)

    def _tables(self, wanted: list[str] | None) -> Iterator[pa.Table]:
        """`tables`, but what JSON text holds is left to who reads it."""
        with called(self.path, self.where):
            yield from self._tables_here(wanted)

    def _tables_here(self, wanted: list[str] | None) -> Iterator[pa.Table]:
        if not self.finished:
            return self._checked(job_store.stored_tables(self._folder, self.schema, wanted))
        if jsonl.is_jsonl(self.path):
            tables = jsonl.read_tables(self.path, self.schema, wanted)
        else:
            found = read_row_groups(self.path, wanted)
            tables = (_as_documented(table, self.schema, wanted, self.where) for table in found)
        return in_order(self._checked(tables), self.where)

    def rows(self, columns: list[str] | None = None) -> Iterator[CompletionRow]:
        """All completions, failed ones included.

        Args:
            columns: read these alone, those without a default among them; default all.
        """
        for table in self._tables(_with_keys(columns)):
            yield from from_record_batch(table, self.metadata, where=self.where)

    def __iter__(self) -> Iterator[CompletionRow]:
        return self.rows()

    def groups(self, columns: list[str] | None = None) -> Iterator[list[CompletionRow]]:
        """The completions of one data row after the other, by `sample_idx`; `columns` as in
        `rows`."""
        for _, rows in itertools.groupby(self.rows(columns), key=lambda row: row.data_idx):
            yield list(rows)

    def prompt_groups(self) -> Iterator[PromptGroup]:
        """What each data row is of a prompt group, for `training.group_rows` and
        `training.iter_groups`, which put together what belongs together. Where completions of a
        data row are of several runs, or were sampled behind different prompt ids, there is one part
        for each."""
        return prompt_groups(self.groups(), self.metadata)

    def training_rows(self) -> Iterator[dict[str, Any]]:
        """One dict per data row, as Eval Protocol's rows are, with arrays for token data. Several
        where `prompt_groups` has several."""
        for group in self.groups():
            yield from to_rows(group, self.metadata, tokens="arrays")

    def evaluation_rows(self) -> Iterator[EvaluationRow]:
        """One `EvaluationRow` per data row, as the rollout processor leaves it; several where
        `training_rows` has several."""
        from eval_protocol.models import EvaluationRow

        for group in self.groups():
            yield from map(EvaluationRow.model_validate, to_rows(group, self.metadata))

    def reward_column(self, name: str | None) -> str:
        """The column of the reward called `name`; None is the main one.

        Raises:
            FormatError: the file has no such column.
        """
        column = file_format.reward_column(name)
        if column not in self.schema.names:
            others = [key.removeprefix(file_format.REWARD_PREFIX) for key in self.metadata.rewards]
            known = ", ".join(repr(key) for key in others if key != "reward")
            raise FormatError(
                f"{self.where}: no reward {name!r}; there are the main one, which needs no name"
                + (f", and {known}" if known else "")
            )
        return column

    @functools.cached_property
    def num_rows(self) -> int:
        """Completions, failed ones included."""
        if not self.finished:
            return job_store.count_stored(self._folder)
        if not jsonl.is_jsonl(self.path):
            with open_parquet(self.path) as file:
                return int(file.metadata.num_rows)
        return sum(len(table) for table in self.tables(job_store.KEY_COLUMNS))

    def rows_about(self) -> int:
        """`num_rows`, soon: JSON lines are counted, blank ones too."""
        if self.finished and jsonl.is_jsonl(self.path):
            return jsonl.count_lines(self.path)
        return self.num_rows

    def __len__(self) -> int:
        return self.num_rows

    def _checked(self, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """The same tables, if what no row may lack is there.

        Raises:
            FormatError: it is not; the message says in which row.
        """
        count = 0
        for table in tables:
            names = set(table.schema.names)
            for name in names.intersection(_NEEDED):
                if table.column(name).null_count:
                    row = count + int(pc.index(table.column(name).is_null(), True).as_py())
                    raise FormatError(f"{self.where}: row {row}: {name} is null: it was damaged")
            if names.issuperset(("completion_ids", "error")):
                nothing = pc.and_(
                    table.column("completion_ids").is_null(), table.column("error").is_null()
                )
                if (row := int(pc.index(nothing, True).as_py())) >= 0:
                    raise FormatError(
                        f"{self.where}: row {count + row}: neither a completion nor an error why "
                        "there is none: it was damaged"
                    )
            count += len(table)
            yield table


def _with_keys(columns: list[str] | None) -> list[str] | None:
    return None if columns is None else list(dict.fromkeys([*job_store.KEY_COLUMNS, *columns]))


def _file_schema(path: Path) -> pa.Schema:
    """The columns of a file in the types that they have here, with those that whoever wrote it left
    out; these are null in every row.

    Raises:
        FormatError: it is no rollout file, or a column holds something else.
    """
    if jsonl.is_jsonl(path):
        found = jsonl.read_schema(path)
    else:
        with open_parquet(path) as file:
            found = file.schema_arrow
    fields = {field.name: field.with_type(_documented(field, path)) for field in found}
    wanted = dict(file_format.FIXED_COLUMNS)
    for column in file_format.metadata_of(found, where=str(path)).rewards:
        number, *others = file_format.reward_columns(column)
        if number in fields:
            wanted |= dict.fromkeys(others, pa.string())
    for name, kind in wanted.items():
        if name not in (*_NEEDED, *_TOLD, *fields):
            fields[name] = pa.field(name, kind)
    return pa.schema(fields.values()).with_metadata(found.metadata)


def _documented(field: pa.Field, path: Path) -> pa.DataType:
    """The type that a column has here: who writes a file anew may take wider ones, or views."""
    wanted = file_format.FIXED_COLUMNS.get(field.name) or file_format.EPISODE_COLUMNS.get(
        field.name
    )
    if field.name == "prompt" and pa.types.is_nested(field.type):
        wanted = file_format.MESSAGES
    if wanted is None or field.name == "ground_truth":
        return plain_type(field.type)
    if field.type == wanted:  # casting imports pandas, for a second
        return wanted
    try:
        pa.schema([field]).empty_table().cast(pa.schema([field.with_type(wanted)]))
    except pa.ArrowException as error:
        raise FormatError(
            f"{path}: column {field.name!r} is {field.type}, and a rollout file has {wanted} there"
        ) from error
    return wanted


def _as_documented(
    table: pa.Table, schema: pa.Schema, wanted: list[str] | None, where: str
) -> pa.Table:
    for name in wanted or schema.names:
        if name not in table.schema.names:
            table = table.append_column(name, pa.nulls(len(table), schema.field(name).type))
    target = pa.schema([schema.field(name) for name in table.schema.names])
    if table.schema.types == target.types:
        return table
    try:
        return table.cast(target.with_metadata(table.schema.metadata))
    except pa.ArrowException as error:
        raise FormatError(f"{where}: a value does not fit its column: {error}") from error


_Ints = NDArray[np.int64]


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
            kind = file_format.json_kind(name)
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
