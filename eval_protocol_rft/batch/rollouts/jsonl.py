"""Rollouts as JSON lines: the same columns, one completion a line.

Invariant: what Parquet holds of a row, a line holds, and back. JSON has no Arrow types and no place
for a file's metadata, so both stand in `<file>.metadata.json` beside it. The two change together:
whoever reads them, also after a crash in between, reads the lines with what was written of them.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from eval_protocol_rft.batch.rollouts.format import FormatError, metadata_of, reward_columns
from eval_protocol_rft.batch.rollouts.jsonl_types import from_json_values, to_json_values
from eval_protocol_rft.batch.rollouts.parquet import ROW_GROUP_ROWS
from eval_protocol_rft.durable import DurableFile, link_target, replacing, write_whole

_TABLE_BYTES = 16 * 2**20
_BATCH_ROWS = 256
"""Rows that are Python objects at a time."""
_LINE = msgspec.json.Decoder(dict[str, msgspec.Raw])
_VALUE = msgspec.json.Decoder()
_NULL = b"null"


def is_jsonl(path: Path) -> bool:
    """Whether a rollout file of that name holds JSON lines."""
    return path.suffix in (".jsonl", ".ndjson")


def metadata_path(path: Path) -> Path:
    """The file beside `path` that says what its lines hold. Where `path` is a link and there is no
    such file beside it: the one beside the file that it leads to."""
    beside = path.with_name(path.name + ".metadata.json")
    if path.is_symlink() and not beside.exists():
        target = link_target(path)
        return target.with_name(target.name + ".metadata.json")
    return beside


@dataclasses.dataclass(slots=True)
class LinesFile:
    """Lines on their way to a file, and what is to stand beside it."""

    file: DurableFile
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    checksum: int = 0

    def write(self, data: bytes) -> None:
        """Append whole lines."""
        self.file.write(data)
        self.checksum = zlib.crc32(data, self.checksum)


@contextlib.contextmanager
def replacing_lines(path: Path) -> Iterator[LinesFile]:
    """New lines that take the place of `path`, together with their metadata, once they are whole
    and on disk; or neither does.

    Two files cannot be replaced in one step. So the metadata first come with a mark of the lines
    they are of, and with those that were there, which count until these lines are there.
    """
    beside = metadata_path(path)
    with replacing(path) as file:
        lines = LinesFile(file)
        yield lines
        if path.exists():
            before = None
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
                before = _metadata_there(path)
            mark = _Mark(file.tell(), lines.checksum, before)
            write_whole(beside, _formatted({**lines.metadata, _MARK: mark}))
        else:
            write_whole(beside, _formatted(lines.metadata))
    if _MARK in _read(beside):
        write_whole(beside, _formatted(lines.metadata))


def write_file(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write rows as lines in the place of `path`; returns their number."""
    with replacing_lines(path) as lines:
        lines.metadata = {
            "eval_protocol_rft": msgspec.to_builtins(metadata_of(schema)),
            "arrow_schema": base64.b64encode(schema.serialize()).decode(),
        }
        return _write_tables(lines, schema, tables)


def read_schema(path: Path) -> pa.Schema:
    """The schema of the lines in `path`.

    Raises:
        FormatError: the file beside it is missing or broken.
    """
    beside = metadata_path(path)
    try:
        values = _metadata_there(path)
        if values is None:
            raise FormatError(
                f"{path}: {beside.name} is not beside it, so what its lines hold is unknown"
            )
        found = msgspec.convert(values, _Beside)
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(found.arrow_schema)))
    except FormatError:
        raise
    except (msgspec.DecodeError, ValueError, pa.ArrowInvalid) as error:
        raise FormatError(f"{beside}: broken: {error}") from error


def _write_tables(lines: LinesFile, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
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
            values = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
            lines.write(encoder.encode_lines(values))
            rows += len(values)
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


def count_lines(path: Path) -> int:
    """Lines of a file, blank ones too."""
    count = 0
    with path.open("rb") as file:
        while piece := file.read(_TABLE_BYTES):
            count += piece.count(b"\n")
    return count


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
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
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
        except (pa.ArrowException, ValueError, TypeError, RecursionError) as error:
            raise FormatError(f"{where}: column {field.name!r}: {error}") from error
    return pa.Table.from_arrays(columns, schema=schema)


class _Beside(msgspec.Struct):
    arrow_schema: str


_MARK = "replaces"


class _Mark(msgspec.Struct):
    """Of lines that may be on their way: they count only where the file is these."""

    size: int
    crc32: int
    before: dict[str, Any] | None
    """The metadata of the lines that were there."""


def _metadata_there(path: Path) -> dict[str, Any] | None:
    """The metadata of the lines that are in `path`; None where there are none."""
    values = _read(metadata_path(path))
    if _MARK not in values:
        return values or None
    mark = msgspec.convert(values.pop(_MARK), _Mark)
    if path.stat().st_size == mark.size and _checksum(path) == mark.crc32:
        return values
    return mark.before


def _read(beside: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(beside.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}


def _formatted(values: dict[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(values), indent=2)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(_TABLE_BYTES):
            checksum = zlib.crc32(piece, checksum)
    return checksum
