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
from eval_protocol_rft.batch.rollouts.format import FormatError, metadata_of, reward_columns
from eval_protocol_rft.batch.rollouts.jsonl_types import from_json_values, to_json_values
from eval_protocol_rft.batch.rollouts.parquet import ROW_GROUP_ROWS

_TABLE_BYTES = 16 * 2**20
_BATCH_ROWS = 256
"""Rows that are Python objects at a time."""
_LINE = msgspec.json.Decoder(dict[str, msgspec.Raw])
_VALUE = msgspec.json.Decoder()
_NULL = b"null"


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
    encoder = msgspec.json.Encoder()
    names = schema.names
    rows = 0
    for table in tables:
        for piece in table.to_batches(max_chunksize=_BATCH_ROWS):
            columns = [
                _raw(piece.column(name))
                if name in json_columns
                else to_json_values(pa.chunked_array([piece.column(name)]))
                for name in names
            ]
            lines = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
            file.write(encoder.encode_lines(lines))
            rows += len(lines)
    return rows


def read_tables(
    path: Path, schema: pa.Schema, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """The lines as tables of `schema`.

    Raises:
        FormatError: a line is no such row; the message names file and line.
    """
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    json_columns = _json_columns(schema)
    held: list[dict[str, msgspec.Raw]] = []
    size = first = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            held.append(_decode(line, f"{path}:{number}"))
            size += len(line)
            first = first or number
            if len(held) >= ROW_GROUP_ROWS or size >= _TABLE_BYTES:
                yield _table(held, wanted, json_columns, f"{path}:{first}-{number}")
                held, size, first = [], 0, 0
    if held:
        yield _table(held, wanted, json_columns, f"{path}:{first}-{number}")


def _json_columns(schema: pa.Schema) -> frozenset[str]:
    """Columns of JSON text, which are JSON values in a line."""
    metadata = metadata_of(schema)
    metrics = [reward_columns(column)[2] for column in ("reward", *metadata.rewards)]
    known = {"tools", *metrics, *metadata.json_columns}
    return frozenset(known.intersection(schema.names))


def _raw(column: pa.Array) -> list[Any]:
    return [None if text is None else msgspec.Raw(text.encode()) for text in column.to_pylist()]


def _decode(line: bytes, where: str) -> dict[str, msgspec.Raw]:
    try:
        return _LINE.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{where}: {error}") from error


def _table(
    rows: list[dict[str, msgspec.Raw]], schema: pa.Schema, json_columns: frozenset[str], where: str
) -> pa.Table:
    columns = []
    for field in schema:
        texts = [bytes(row.get(field.name, _NULL)) for row in rows]
        try:
            if field.name in json_columns:
                # Decoding could change its numbers, so it stays as it stands.
                values = [None if text == _NULL else text.decode() for text in texts]
                columns.append(pa.array(values, field.type))
            else:
                columns.append(from_json_values(list(map(_VALUE.decode, texts)), field.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError, TypeError) as error:
            raise FormatError(f"{where}: column {field.name!r}: {error}") from error
    return pa.Table.from_arrays(columns, schema=schema)


class _Beside(msgspec.Struct):
    arrow_schema: str
