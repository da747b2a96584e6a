"""The prompts behind rollouts, as rows of the data set that they came from.

Invariant: a data row comes out once, with the columns that it had, under their names; what JSON
cannot say is an error, not null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eval_protocol_rft.batch.rollouts.format import ORIGINAL_PREFIX, FormatError, metadata_of
from eval_protocol_rft.batch.rollouts.jsonl import is_jsonl
from eval_protocol_rft.durable import replacing


def original_columns(schema: pa.Schema) -> list[str]:
    """The columns of the data set, with their prefix.

    Raises:
        FormatError: there are none.
    """
    names = [name for name in schema.names if name.startswith(ORIGINAL_PREFIX)]
    if not names:
        raise FormatError(
            f"the file holds no columns {ORIGINAL_PREFIX}*: its rollouts did not come from a data "
            "set, so it has no prompts to give back"
        )
    return names


def write_prompts(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write one row of the data set for each data row in `tables`; returns their number.

    Args:
        path: JSON lines by its extension, in which columns of JSON text are the values that they
            stand for; else Parquet, in which they stay text.
        schema: of the rollout file.
        tables: rows of it, whole data rows each.

    Raises:
        FormatError: a value that is none in JSON.
    """
    names = original_columns(schema)
    fields = [schema.field(name) for name in names]
    plain = pa.schema([field.with_name(_stripped(field.name)) for field in fields])
    rows = 0
    with replacing(path) as file:
        if is_jsonl(path):
            known = frozenset(metadata_of(schema).json_columns)
            json_columns = [_stripped(name) for name in names if name in known]
            for table in _firsts(tables, names, plain):
                file.write(b"".join(_lines(table, json_columns)))
                rows += len(table)
        else:
            with pq.ParquetWriter(pa.PythonFile(file, mode="w"), plain) as target:
                for table in _firsts(tables, names, plain):
                    target.write_table(table)
                    rows += len(table)
    return rows


def _firsts(tables: Iterable[pa.Table], names: list[str], schema: pa.Schema) -> Iterator[pa.Table]:
    """The first row of each data row."""
    for table in tables:
        data_idx = np.asarray(table.column("data_idx"))
        first = np.flatnonzero(np.append(True, data_idx[1:] != data_idx[:-1]))
        yield table.select(names).take(first).rename_columns(schema.names).cast(schema)


def _lines(table: pa.Table, json_columns: list[str]) -> Iterator[bytes]:
    for values in table.to_pylist():
        for name in json_columns:
            if values[name] is not None:
                values[name] = msgspec.json.decode(values[name])
        yield _json(values) + b"\n"


def _json(values: dict[str, Any]) -> bytes:
    # msgspec would write NaN as null; Python's encoder can refuse it.
    try:
        text = json.dumps(values, ensure_ascii=False, allow_nan=False, default=msgspec.to_builtins)
    except (TypeError, ValueError) as error:
        raise FormatError(
            f"a row of the data set cannot be a JSON line: {error}. Write .parquet instead; the "
            f"row begins {str(values)[:200]}"
        ) from error
    return text.encode()


def _stripped(name: str) -> str:
    return name.removeprefix(ORIGINAL_PREFIX)
