"""Writing a whole rollout file, in either format.

Invariant: the file appears under its name when it is complete and on disk, or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from eval_protocol_rft.batch.dataset import is_jsonl
from eval_protocol_rft.batch.durable import replacing
from eval_protocol_rft.batch.rollouts import jsonl, parquet
from eval_protocol_rft.batch.rollouts.rows import CompletionRow, to_record_batch


class OutputError(ValueError):
    """A file cannot be written as asked."""


def check_output(path: Path) -> None:
    """Look whether `path` can become a rollout file, before work is put into it.

    Raises:
        OutputError: its name says no format, or its folder cannot be written.
    """
    if path.suffix not in (".parquet", ".jsonl", ".ndjson"):
        raise OutputError(f"{path}: name the output .parquet or .jsonl")
    if path.is_dir():
        raise OutputError(f"{path}: there is a folder of that name")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise OutputError(f"{path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: cannot write to {folder}")


def write_file(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write `tables`, which have `schema`, in the place of `path`; returns the number of rows.

    Raises:
        OSError: the file cannot be written; one that was there is as it was.
    """
    with replacing(path) as file:
        if is_jsonl(path):
            rows = jsonl.write_tables(file, schema, tables)
            jsonl.write_schema(path, schema)
            return rows
        return parquet.write_tables(file, schema, tables)


def write_rows(
    path: str | os.PathLike[str], schema: pa.Schema, rows: Iterable[CompletionRow]
) -> int:
    """Write rows, those of a data row together and by `sample_idx`; returns their number."""
    return write_file(Path(path), schema, tables_of(rows, schema))


def tables_of(rows: Iterable[CompletionRow], schema: pa.Schema) -> Iterator[pa.Table]:
    """Rows as tables that each fit a row group."""
    held: list[CompletionRow] = []
    tokens = 0
    for row in rows:
        prompt = 0 if row.prompt_ids is None else len(row.prompt_ids)
        held.append(row)
        tokens += row.num_tokens + prompt
        if len(held) >= parquet.ROW_GROUP_ROWS or tokens >= parquet.ROW_GROUP_TOKENS:
            yield pa.Table.from_batches([to_record_batch(held, schema)])
            held, tokens = [], 0
    if held:
        yield pa.Table.from_batches([to_record_batch(held, schema)])
