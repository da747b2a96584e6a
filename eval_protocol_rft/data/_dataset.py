"""`RolloutDataset`: a rollout file, read lazily.

Invariant: rows come in file order and the completions of a data row stand together, whatever the
file's format and whether its job was finished. Only what is being looked at is in memory.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from eval_protocol_rft.data._job_store import (
    KEY_COLUMNS,
    count_stored,
    parts_folder,
    read_schema,
    stored_tables,
)
from eval_protocol_rft.data.conversion._to_ep import to_rows
from eval_protocol_rft.data.rollouts import _jsonl as jsonl
from eval_protocol_rft.data.rollouts._checking import in_order, with_json_text
from eval_protocol_rft.data.rollouts._format import (
    EPISODE_COLUMNS,
    FIXED_COLUMNS,
    MESSAGES,
    REWARD_PREFIX,
    FileMetadata,
    FormatError,
    metadata_of,
    reward_column,
    reward_columns,
)
from eval_protocol_rft.data.rollouts._jsonl import METADATA_SUFFIX
from eval_protocol_rft.data.rollouts._parquet import open_parquet, read_row_groups
from eval_protocol_rft.data.rollouts._records import part_of
from eval_protocol_rft.data.rollouts._rows import CompletionRow, by_record, from_record_batch
from eval_protocol_rft.data.source._arrow import plain_type
from eval_protocol_rft.data.source._places import called, one_place
from eval_protocol_rft.training import PromptGroup, TokenBuffer

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
        folder = self.path if self.path.is_dir() else parts_folder(self.path)
        if self.finished:
            self.schema: pa.Schema = _file_schema(self.path)
        else:
            found = read_schema(folder)
            if found is None:
                raise FormatError(
                    f"{self.where}: no such rollout file, and no unfinished job for it"
                )
            self.schema = found
        needed = [*_NEEDED, *_TOLD]
        if not EPISODE_COLUMNS.keys().isdisjoint(self.schema.names):
            needed += EPISODE_COLUMNS
        missing = [name for name in needed if name not in self.schema.names]
        if missing:
            raise FormatError(f"{self.where}: no rollout file: it has no column {missing[0]!r}")
        self._folder = folder
        self.metadata: FileMetadata = metadata_of(self.schema, where=self.where)

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
            return self._checked(stored_tables(self._folder, self.schema, wanted))
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
        buffer = TokenBuffer()
        for group in self.groups():
            for part in by_record(group):
                yield part_of(part, self.metadata, buffer)

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
        column = reward_column(name)
        if column not in self.schema.names:
            others = [key.removeprefix(REWARD_PREFIX) for key in self.metadata.rewards]
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
            return count_stored(self._folder)
        if not jsonl.is_jsonl(self.path):
            with open_parquet(self.path) as file:
                return int(file.metadata.num_rows)
        return sum(len(table) for table in self.tables(KEY_COLUMNS))

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
    return None if columns is None else list(dict.fromkeys([*KEY_COLUMNS, *columns]))


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
    wanted = dict(FIXED_COLUMNS)
    for column in metadata_of(found, where=str(path)).rewards:
        number, *others = reward_columns(column)
        if number in fields:
            wanted |= dict.fromkeys(others, pa.string())
    for name, kind in wanted.items():
        if name not in (*_NEEDED, *_TOLD, *fields):
            fields[name] = pa.field(name, kind)
    return pa.schema(fields.values()).with_metadata(found.metadata)


def _documented(field: pa.Field, path: Path) -> pa.DataType:
    """The type that a column has here: who writes a file anew may take wider ones, or views."""
    wanted = FIXED_COLUMNS.get(field.name) or EPISODE_COLUMNS.get(field.name)
    if field.name == "prompt" and pa.types.is_nested(field.type):
        wanted = MESSAGES
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
