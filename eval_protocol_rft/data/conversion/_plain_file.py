"""Files of any columns: Parquet or JSON lines, by the name's ending.

Invariant: the file appears under its name when it is complete and on disk, or not at all.

Values of rollout files in the form that trainers' data sets have them, and back. Pure.

What JSON does to columns, both ways.

Invariant: values of a column that is read from JSON come out of the file as they were in the JSON;
values that JSON cannot hold are found before, or counted while, they are written as JSON.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eval_protocol_rft._durable import DurableFile, replacing
from eval_protocol_rft.data._files import JobError, tables_of
from eval_protocol_rft.data.conversion._types import Rollouts, is_parquet, read_parquet_schema
from eval_protocol_rft.data.rollouts._format import FileMetadata, PromptKind, decode_metadata
from eval_protocol_rft.data.rollouts._format import schema as rollout_schema
from eval_protocol_rft.data.rollouts._parquet import ROW_GROUP_ROWS, ROW_GROUP_TOKENS
from eval_protocol_rft.data.rollouts._rows import ChatMessages, CompletionRow

_INT64 = range(-(2**63), 2**63)
_PLAIN: dict[type, pa.DataType] = {
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    str: pa.string(),
}


class JsonColumn:
    """The type of a column, from all of its values; None is of every type."""

    def __init__(self) -> None:
        self._seen: set[type] = set()

    def add(self, value: Any) -> None:
        if value is not None:
            fits = type(value) is not int or value in _INT64
            self._seen.add(type(value) if fits else object)

    @property
    def type(self) -> pa.DataType:
        """Arrow type; text where `is_json`."""
        return pa.string() if self.is_json or not self._seen else _PLAIN[next(iter(self._seen))]

    @property
    def is_json(self) -> bool:
        """Whether the column is to hold JSON text: values of several types, or no plain ones."""
        return len(self._seen) > 1 or not self._seen <= _PLAIN.keys()


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


@dataclass(frozen=True, slots=True)
class ConvertedFile:
    """A Parquet file that `write_rows` wrote."""

    path: Path
    schema: pa.Schema
    metadata: FileMetadata
    """Of the rollout file; of `json_columns` only `ground_truth` can be there."""

    @classmethod
    def open(cls, path: Path, *, needed: Iterable[str]) -> ConvertedFile:
        """Look at a file that has to have the columns `needed`.

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
        metadata = decode_metadata(schema.metadata[SOURCE_KEY], where=str(path))
        json_columns = [name for name in metadata.json_columns if name == "ground_truth"]
        return cls(path, schema, msgspec.structs.replace(metadata, json_columns=json_columns))

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows, as plain values."""
        with pq.ParquetFile(self.path) as file:
            for i in range(file.num_row_groups):
                table = file.read_row_group(i, use_threads=False)
                for batch in table.to_batches(max_chunksize=_ROWS):
                    yield from batch.to_pylist()

    def rollouts(
        self,
        completions: Callable[[dict[str, Any]], Iterable[CompletionRow]],
        *,
        ground_truth: pa.DataType | None,
    ) -> Rollouts:
        """Rollouts of the completions that each row stands for.

        Args:
            completions: what a row stands for.
            ground_truth: type of that column.
        """
        fields = rollout_schema(self.metadata, {}, ground_truth=ground_truth)

        def data_rows() -> Iterator[CompletionRow]:
            rows = (completion for row in self.rows() for completion in completions(row))
            # verl's are several for a data row with several prompts.
            for _, group in itertools.groupby(rows, key=lambda completion: completion.data_idx):
                yield from sorted(group, key=lambda completion: completion.sample_idx)

        def tables() -> Iterator[pa.Table]:
            return tables_of(data_rows(), fields)

        return Rollouts(self.path, fields, tables)


def _write_parquet(file: DurableFile, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    sink = pa.PythonFile(file, mode="w")
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


def _tables(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    held: list[Mapping[str, Any]] = []
    tokens = 0
    for row in rows:
        held.append(row)
        tokens += sum(map(_count_tokens, row.values()))
        if len(held) >= ROW_GROUP_ROWS or tokens >= ROW_GROUP_TOKENS:
            yield pa.Table.from_pylist(held, schema)
            held, tokens = [], 0
    if held:
        yield pa.Table.from_pylist(held, schema)


def _count_tokens(value: Any) -> int:
    """Numbers in an array, or in a list of arrays; ids and logprobs both count."""
    if isinstance(value, list):
        return sum(map(_count_tokens, value))
    return len(value) if isinstance(value, np.ndarray) else 0


def as_prompt(messages: Sequence[Mapping[str, Any]], kind: PromptKind) -> str | ChatMessages:
    """`as_messages` undone, nulls of the file left out."""
    if kind == "text":
        return str(messages[0]["content"])
    return [{k: v for k, v in message.items() if v is not None} for message in messages]


def json_text(value: Any) -> str | None:
    """JSON of a value; null stays null."""
    return None if value is None else msgspec.json.encode(value).decode()


def from_json_text(text: str | None) -> Any:
    """`json_text` undone."""
    return None if text is None else msgspec.json.decode(text)


def stored_truth(value: Any, metadata: FileMetadata) -> Any:
    """A ground truth as the file's column holds it."""
    return json_text(value) if "ground_truth" in metadata.json_columns else value


def read_truth(value: Any, metadata: FileMetadata) -> Any:
    """`stored_truth` undone."""
    return from_json_text(value) if "ground_truth" in metadata.json_columns else value


def check_one_turn(rows: Sequence[CompletionRow], path: Path, target: str) -> None:
    """Refuse completions of a data row that are the first of several turns: `target` has a place
    for one prompt and one answer, and the reward is that of all turns.

    Raises:
        JobError: one of them is.
    """
    for row in rows:
        if row.episode is not None and row.episode["turns"] > 1:
            raise JobError(
                f"{path}: data row {row.data_idx}, completion {row.sample_idx}: an episode of "
                f"{row.episode['turns']} turns, and a row for {target} is a prompt with one "
                "answer; the reward is that of all turns. Train on `ep-rft datums` of the file, "
                "which hold every turn, or convert to Eval Protocol's rows (--to ep)"
            )
