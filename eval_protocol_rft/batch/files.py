"""Writing a whole rollout file, in either format.

Invariant: the file appears under its name when it is complete and on disk, or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from eval_protocol_rft.batch.rollouts import jsonl, parquet
from eval_protocol_rft.batch.rollouts.rows import CompletionRow, to_record_batch
from eval_protocol_rft.durable import replacing


def write_file(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write `tables`, which have `schema`, in the place of `path`; returns the number of rows.

    Raises:
        OSError: the file cannot be written; one that was there is as it was.
    """
    if jsonl.is_jsonl(path):
        return jsonl.write_file(path, schema, tables)
    with replacing(path) as file:
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
