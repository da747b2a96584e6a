"""What travels between the readers and the writers of a conversion.

Which format a file has, by what is in it.

Invariant: a file is of a format only if nothing else would look like it; else the user is asked.

What there is in rollouts to be converted: asked before a file with fewer columns is written.

Invariant: a column of the target exists exactly where some completion has a value for it. Chat
templates take a field that is there and null for one that is set, so messages have no field that
none of them uses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.data._job_store import parts_folder
from eval_protocol_rft.data.rollouts._format import (
    MESSAGES,
    METADATA_KEY,
    FileMetadata,
    metadata_of,
)
from eval_protocol_rft.data.rollouts._jsonl import metadata_path
from eval_protocol_rft.data.rollouts._rows import CompletionRow, from_record_batch

Format = Literal["rollouts", "ep", "verl", "trl"]


@dataclass(frozen=True, slots=True)
class ConvertSummary:
    """What a conversion did."""

    source: str
    """As it was named, without what is secret of a URL."""
    target: Path
    from_format: Format
    to_format: Format
    data_rows: int
    """Written to the target."""
    completions: int
    """Written to the target; of a rollout file and of rows, failed ones too."""
    notes: tuple[str, ...]
    """What the target does not hold, and what was changed."""

    def __str__(self) -> str:
        done = f"{self.completions} completions of {self.data_rows} data rows"
        return "\n".join([f"{self.target} ({self.to_format}): {done}", *self.notes])


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Rollouts from whatever file, as those of a rollout file. Can be read more than once."""

    path: Path
    schema: pa.Schema
    read: Callable[[], Iterator[pa.Table]]
    """The tables, none of them empty; the completions of a data row stand together."""
    notes: tuple[str, ...] = ()

    @property
    def metadata(self) -> FileMetadata:
        return metadata_of(self.schema)

    def groups(self) -> Iterator[list[CompletionRow]]:
        """The completions of one data row after the other."""
        metadata = self.metadata
        where = str(self.path)
        tables = (from_record_batch(table, metadata, where=where) for table in self.read())
        rows = itertools.chain.from_iterable(tables)
        for _, group in itertools.groupby(rows, key=lambda row: row.data_idx):
            yield list(group)


def split_note(data_rows: int) -> tuple[str, ...]:
    """What to say of data rows that became a row for each of their prompts."""
    if not data_rows:
        return ()
    return (
        f"data rows with completions of several prompts ({data_rows}) are a row for each prompt: "
        "their chat template rendered something else when the job went on, such as the date",
    )


Written = tuple[int, int, tuple[str, ...]]
"""What a writer put into the target: data rows, completions, and notes on what it did not."""


_MARKS: Mapping[Format, frozenset[str]] = {
    "ep": frozenset({"messages", "execution_metadata"}),
    "rollouts": frozenset({"data_idx", "sample_idx", "completion_ids", "response"}),
    "verl": frozenset({"data_source", "prompt"}),
    "trl": frozenset({"prompt", "completion"}),
}
"""Columns that a format has, the more telling formats first."""
_PARQUET = b"PAR1"


def is_parquet(path: Path) -> bool:
    """Whether the file begins as Parquet does."""
    with path.open("rb") as file:
        return file.read(len(_PARQUET)) == _PARQUET


def read_parquet_schema(path: Path) -> pa.Schema:
    """The schema of any Parquet file.

    Raises:
        JobError: it is not a whole one.
    """
    try:
        return pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise JobError(f"{path}: not a whole Parquet file: {error}") from error


def detect_format(path: Path) -> Format:
    """The format of a file, or of the unfinished job that is to write it.

    Raises:
        JobError: there is no such file, or it may be anything.
    """
    if path.is_dir():
        raise JobError(f"{path}: a folder; name the file in it")
    if not path.is_file():
        if parts_folder(path).is_dir():
            return "rollouts"
        raise JobError(f"{path}: no such file")
    if is_parquet(path):
        schema = read_parquet_schema(path)
        if METADATA_KEY in (schema.metadata or {}):
            return "rollouts"
        return _by_columns(path, schema.names)
    if metadata_path(path).is_file():
        return "rollouts"
    return _by_columns(path, list(_first_line(path)))


def _by_columns(path: Path, names: Sequence[str]) -> Format:
    for name, marks in _MARKS.items():
        if marks <= set(names):
            return name
    raise JobError(
        f"{path}: which format is this? It has {', '.join(names) or 'no columns'}; say --from "
        f"{', '.join(_MARKS)}"
    )


def _first_line(path: Path) -> dict[str, Any]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                values: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise JobError(
                    f"{path}:{number}: neither Parquet nor JSON lines: {error}"
                ) from error
            return values
    raise JobError(f"{path}: an empty file")


_ALWAYS = ("role", "content")


@dataclass(slots=True)
class Survey:
    """Of all completions that did not fail."""

    held: set[str] = field(default_factory=set)
    """Columns with a value somewhere."""
    failed: int = 0
    """Completions that failed, which nothing else here counts."""
    _fields: set[str] = field(default_factory=lambda: set(_ALWAYS))

    @classmethod
    def of(cls, rollouts: Rollouts) -> Survey:
        """Read them once."""
        survey = cls()
        for table in rollouts.read():
            survey._add(table)
        return survey

    @property
    def messages(self) -> pa.DataType:
        """Type of the prompt column."""
        return pa.list_(pa.struct([f for f in MESSAGES.value_type if f.name in self._fields]))

    def notes(self, carried: Iterable[str], metadata: FileMetadata) -> tuple[str, ...]:
        """What a target that has only `carried` does not hold."""
        notes = []
        if self.failed:
            notes.append(f"failed completions ({self.failed}) are not in the output")
        left_out = sorted(self.held - set(carried))
        if left_out:
            notes.append(f"columns not in the output: {', '.join(left_out)}")
        if "ground_truth" in self.held and "ground_truth" in metadata.json_columns:
            notes.append("ground truths of several types are JSON text in the output")
        return tuple(notes)

    def _add(self, table: pa.Table) -> None:
        survived = table.filter(pc.is_null(table.column("error")))
        self.failed += len(table) - len(survived)
        for name in set(survived.schema.names) - self.held:
            if survived.column(name).null_count < len(survived):
                self.held.add(name)
        if survived.schema.field("prompt").type == MESSAGES:
            for chunk in survived.column("prompt").chunks:
                messages = chunk.flatten()
                for i, name in enumerate(MESSAGES.value_type.names):
                    if messages.field(i).null_count < len(messages):
                        self._fields.add(name)
