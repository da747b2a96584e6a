"""Rollouts as JSON lines: the same columns, one completion a line.

Invariant: what Parquet holds of a row, a line holds, and back. JSON has no Arrow types and no place
for a file's metadata, so both stand in `<file>.metadata.json` beside it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from eval_protocol_rft.batch.durable import DurableFile, write_whole
from eval_protocol_rft.batch.format import FormatError, metadata_of, reward_columns
from eval_protocol_rft.batch.parquet import ROW_GROUP_ROWS

_TABLE_BYTES = 16 * 2**20


def metadata_path(path: Path) -> Path:
    """The file beside `path` that says what its lines hold."""
    return path.with_name(path.name + ".metadata.json")


def write_schema(path: Path, schema: pa.Schema) -> None:
    """Write the file beside `path`."""
    values = {
        "eval_protocol_rft": msgspec.to_builtins(metadata_of(schema)),
        "arrow_schema": base64.b64encode(schema.serialize()).decode(),
    }
    write_whole(metadata_path(path), msgspec.json.format(msgspec.json.encode(values), indent=2))


def read_schema(path: Path) -> pa.Schema:
    """The schema of the lines in `path`.

    Raises:
        FormatError: the file beside it is missing or broken.
    """
    beside = metadata_path(path)
    try:
        values = msgspec.json.decode(beside.read_bytes(), type=_Beside)
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(values.arrow_schema)))
    except FileNotFoundError:
        raise FormatError(
            f"{path}: {beside.name} is not beside it, so what its lines hold is unknown"
        ) from None
    except (ValueError, pa.ArrowInvalid) as error:
        raise FormatError(f"{beside}: broken: {error}") from error


def write_tables(file: DurableFile, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write rows as lines; returns their number."""
    json_columns = _json_columns(schema)
    encoder = msgspec.json.Encoder(enc_hook=str)
    rows = 0
    for table in tables:
        values = table.to_pylist()
        for value in values:
            for name in json_columns:
                if value[name] is not None:
                    value[name] = msgspec.Raw(value[name].encode())
        file.write(encoder.encode_lines(values))
        rows += len(values)
    return rows


def read_tables(
    path: Path, schema: pa.Schema, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """The lines as tables of `schema`.

    Raises:
        FormatError: a line is no such row; the message names file and line.
    """
    json_columns = _json_columns(schema)
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    held: list[dict[str, Any]] = []
    size = first = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            held.append(_decode(line, json_columns, f"{path}:{number}"))
            size += len(line)
            first = first or number
            if len(held) >= ROW_GROUP_ROWS or size >= _TABLE_BYTES:
                yield _table(held, wanted, f"{path}:{first}-{number}")
                held, size, first = [], 0, 0
    if held:
        yield _table(held, wanted, f"{path}:{first}-{number}")


def _json_columns(schema: pa.Schema) -> list[str]:
    """Columns of JSON text, which are JSON values in a line."""
    metadata = metadata_of(schema)
    metrics = [reward_columns(column)[2] for column in ("reward", *metadata.rewards)]
    known = {"tools", *metrics, *metadata.json_columns}
    return [name for name in schema.names if name in known]


def _decode(line: bytes, json_columns: list[str], where: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{where}: {error}") from error
    for name in json_columns:
        if values.get(name) is not None:
            values[name] = msgspec.json.encode(values[name]).decode()
    return values


def _table(rows: list[dict[str, Any]], schema: pa.Schema, where: str) -> pa.Table:
    try:
        return pa.Table.from_pylist(rows, schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise FormatError(f"{where}: {error}") from error


class _Beside(msgspec.Struct):
    arrow_schema: str
