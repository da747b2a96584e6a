"""Files of any columns: Parquet or JSON lines, by the name's ending.

Invariant: the file appears under its name when it is complete and on disk, or not at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eval_protocol_rft.batch.conversion.detect import is_parquet, read_parquet_schema
from eval_protocol_rft.batch.conversion.json_types import NonFinite, text_notes
from eval_protocol_rft.batch.conversion.types import ConvertError, Rollouts
from eval_protocol_rft.batch.files import tables_of
from eval_protocol_rft.batch.rollouts.format import FileMetadata, decode_metadata
from eval_protocol_rft.batch.rollouts.format import schema as rollout_schema
from eval_protocol_rft.batch.rollouts.parquet import ROW_GROUP_ROWS, ROW_GROUP_TOKENS
from eval_protocol_rft.batch.rollouts.rows import CompletionRow
from eval_protocol_rft.durable import DurableFile, replacing

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
            ConvertError: it is no such file; most often, it has text and no tokens.
        """
        if not path.is_file():
            raise ConvertError(f"{path}: no such file")
        if not is_parquet(path):
            raise ConvertError(
                f"{path}: only Parquet that `ep-rft convert` wrote is read back: other files do "
                "not say which tokens were sampled, and how"
            )
        schema = read_parquet_schema(path)
        missing = [name for name in needed if name not in schema.names]
        if missing:
            raise ConvertError(
                f"{path}: no column {missing[0]!r}. Rollouts need the tokens that were sampled "
                "and their logprobs, and text is never tokenized again: sample anew with "
                "`ep-rft generate`"
            )
        if SOURCE_KEY not in (schema.metadata or {}):
            raise ConvertError(
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
