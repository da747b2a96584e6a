"""Rollouts on their way through a conversion, and files of any columns that they become: Parquet or
JSON lines, by the name's ending.

Invariant: a column of the target exists exactly where some completion has a value for it. Chat
templates take a field that is there and null for one that is set, so messages have no field that
none of them uses. Values that JSON cannot hold are found before, or counted while, they are written
as JSON. The file appears under its name when it is complete and on disk, or not at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eval_protocol_rft._durable import DurableFile, replacing
from eval_protocol_rft.data import _format as file_format
from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.data._format import CompletionRow, FileMetadata
from eval_protocol_rft.data._records import as_messages
from eval_protocol_rft.data._row_groups import from_record_batch, in_row_groups, tables_of


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
        return file_format.metadata_of(self.schema)

    def groups(self) -> Iterator[list[CompletionRow]]:
        """The completions of one data row after the other."""
        metadata = self.metadata
        where = str(self.path)
        tables = (from_record_batch(table, metadata, where=where) for table in self.read())
        rows = itertools.chain.from_iterable(tables)
        for _, group in itertools.groupby(rows, key=lambda row: row.data_idx):
            yield list(group)


Written = tuple[int, int, tuple[str, ...]]
"""What a writer put into the target: data rows, completions, and notes on what it did not."""


def split_note(data_rows: int) -> tuple[str, ...]:
    """What to say of data rows that became a row for each of their prompts."""
    if not data_rows:
        return ()
    return (
        f"data rows with completions of several prompts ({data_rows}) are a row for each prompt: "
        "their chat template rendered something else when the job went on, such as the date",
    )


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
        return pa.list_(
            pa.struct([f for f in file_format.MESSAGES.value_type if f.name in self._fields])
        )

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
        if survived.schema.field("prompt").type == file_format.MESSAGES:
            for chunk in survived.column("prompt").chunks:
                messages = chunk.flatten()
                for i, name in enumerate(file_format.MESSAGES.value_type.names):
                    if messages.field(i).null_count < len(messages):
                        self._fields.add(name)


def survives_json(kind: pa.DataType) -> bool:
    """Whether values of an Arrow type are of that type again after they were JSON."""
    if pa.types.is_nested(kind):
        if pa.types.is_map(kind) or pa.types.is_union(kind):
            return False
        return all(survives_json(kind.field(i).type) for i in range(kind.num_fields))
    return bool(
        pa.types.is_null(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
    )


def text_notes(schema: pa.Schema) -> tuple[str, ...]:
    """What is said of columns that `survives_json` is false for."""
    return tuple(
        f"column {column.name} is {column.type}, which is text in JSON"
        for column in schema
        if not survives_json(column.type)
    )


class NonFinite:
    """Counts NaN and infinity, which JSON writes as null."""

    def __init__(self) -> None:
        self._found: dict[str, int] = {}

    def watch(self, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """The same tables."""
        for table in tables:
            for name in table.schema.names:
                for chunk in table.column(name).chunks:
                    count = _non_finite(chunk)
                    if count:
                        self._found[name] = self._found.get(name, 0) + count
            yield table

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(
            f"{count} values of {name} are NaN or infinite, which is null in JSON"
            for name, count in self._found.items()
        )


def _non_finite(array: pa.Array) -> int:
    kind = array.type
    if pa.types.is_floating(kind):
        values = array if kind != pa.float16() else array.cast(pa.float32())
        return pc.sum(pc.invert(pc.is_finite(values))).as_py() or 0
    if pa.types.is_struct(kind):
        return sum(_non_finite(field) for field in array.flatten())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _non_finite(array.flatten())
    return 0


SOURCE_KEY = b"eval_protocol_rft_source"
"""Key in the Parquet file's metadata: what the rollout file said of itself."""
_ROWS = 16
"""Rows that are Python objects at a time: of verl's, each is all completions of a prompt."""


def write_rows(
    target: Path, schema: pa.Schema, metadata: FileMetadata, rows: Iterable[Mapping[str, Any]]
) -> tuple[str, ...]:
    """Write rows, of which arrays are numpy's; returns what was lost."""
    schema = schema.with_metadata({SOURCE_KEY: metadata.encode()})
    with replacing(target) as file:
        if target.suffix == ".parquet":
            _write_parquet(file, schema, _tables(rows, schema))
            return ()
        non_finite = NonFinite()
        encoder = msgspec.json.Encoder(enc_hook=str)
        for table in non_finite.watch(_tables(rows, schema)):
            for batch in table.to_batches(max_chunksize=_ROWS):
                file.write(encoder.encode_lines(batch.to_pylist()))
        return (*text_notes(schema), *non_finite.notes)


def _write_parquet(file: DurableFile, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    sink = pa.PythonFile(file, mode="w")
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


def _tables(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    for held in in_row_groups(rows, lambda row: sum(map(_count_tokens, row.values()))):
        yield pa.Table.from_pylist(held, schema)


def _count_tokens(value: Any) -> int:
    """Numbers in an array, or in a list of arrays; ids and logprobs both count."""
    if isinstance(value, list):
        return sum(map(_count_tokens, value))
    return len(value) if isinstance(value, np.ndarray) else 0


_DATA_COLUMN = b"eval_protocol_rft_data_column"


def data_field(name: str, kind: pa.DataType, column: str) -> pa.Field:
    """A field of a converted file that is a column of the data set."""
    return pa.field(name, kind, metadata={_DATA_COLUMN: column.encode()})


def data_columns(schema: pa.Schema) -> dict[str, str]:
    """Column of a converted file -> column of the data set that it is."""
    return {
        field.name: field.metadata[_DATA_COLUMN].decode()
        for field in schema
        if field.metadata and _DATA_COLUMN in field.metadata
    }


def talk_types(survey: Survey, metadata: FileMetadata) -> tuple[pa.DataType, pa.DataType]:
    """Types of a prompt and of an answer: lists of messages; of raw text, text."""
    if metadata.sampling is not None and metadata.sampling.raw:
        return pa.string(), pa.string()
    return survey.messages, pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def talk(row: CompletionRow, metadata: FileMetadata) -> tuple[Any, Any]:
    """What was asked and what was answered, in `talk_types`."""
    if metadata.sampling is not None and metadata.sampling.raw:
        asked = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
        return asked, row.response
    return as_messages(row.prompt), [{"role": "assistant", "content": row.response}]


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


def open_converted(path: Path, *, needed: Iterable[str]) -> tuple[pa.Schema, FileMetadata]:
    """Look at a Parquet file that `write_rows` wrote, which has to have the columns `needed`: its
    schema, and the metadata of the rollout file, with those of its `json_columns` that are there.

    Raises:
        JobError: it is no such file; most often, it has text and no tokens.
    """
    if not path.is_file():
        raise JobError(f"{path}: no such file")
    if not is_parquet(path):
        raise JobError(
            f"{path}: only Parquet that `ep-rft convert` wrote is read back: other files do "
            "not say which tokens were sampled, and how"
        )
    schema = read_parquet_schema(path)
    missing = [name for name in needed if name not in schema.names]
    if missing:
        raise JobError(
            f"{path}: no column {missing[0]!r}. Rollouts need the tokens that were sampled "
            "and their logprobs, and text is never tokenized again: sample anew with "
            "`ep-rft generate`"
        )
    if SOURCE_KEY not in (schema.metadata or {}):
        raise JobError(
            f"{path}: its metadata does not say how the completions were sampled. Only files "
            "that `ep-rft convert` wrote do; whatever writes them anew leaves it out"
        )
    metadata = file_format.decode_metadata(schema.metadata[SOURCE_KEY], where=str(path))
    there = {file_format.ORIGINAL_PREFIX + name for name in data_columns(schema).values()}
    there.add("ground_truth")
    json_columns = [name for name in metadata.json_columns if name in there]
    return schema, msgspec.structs.replace(metadata, json_columns=json_columns)


def rollouts_in(
    path: Path,
    metadata: FileMetadata,
    completions: Callable[[dict[str, Any]], Iterable[CompletionRow]],
    *,
    ground_truth: pa.DataType | None,
    original: Mapping[str, pa.DataType] | None = None,
) -> Rollouts:
    """Rollouts of the file that `open_converted` looked at.

    Args:
        completions: those that a row stands for.
        ground_truth: type of that column.
        original: column of the data set -> its type.
    """
    fields = file_format.schema(metadata, original or {}, ground_truth=ground_truth)

    def data_rows() -> Iterator[CompletionRow]:
        rows = (completion for row in _rows(path) for completion in completions(row))
        # verl's are several for a data row with several prompts.
        for _, group in itertools.groupby(rows, key=lambda completion: completion.data_idx):
            yield from sorted(group, key=lambda completion: completion.sample_idx)

    return Rollouts(path, fields, lambda: tables_of(data_rows(), fields))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows, as plain values."""
    with pq.ParquetFile(path) as file:
        for i in range(file.num_row_groups):
            table = file.read_row_group(i, use_threads=False)
            for batch in table.to_batches(max_chunksize=_ROWS):
                yield from batch.to_pylist()
