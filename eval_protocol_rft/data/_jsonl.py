"""Rollouts as JSON lines: the same columns, one completion a line.

Invariant: what Parquet holds of a row, a line holds, and back. JSON has no Arrow types and no place
for a file's metadata, so both stand in `<file>.metadata.json` beside it. The two change together:
whoever reads them, also after a crash in between, reads the lines with what was written of them.

Arrow values as JSON and back: how a line spells what JSON has no type for.

Invariant: a value that was spelled is read back as it was, bit by bit, given its Arrow type.

| Arrow | in a line |
| --- | --- |
| timestamp, date, time | text, ISO 8601; those with a zone in UTC |
| decimal | text |
| binary | text, base64 |
| duration | integer, in the unit of its type |
| map | list of [key, value] pairs |
| float NaN, infinite | text: `NaN`, `Infinity`, `-Infinity` |
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import decimal
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from eval_protocol_rft._durable import DurableFile, link_target, replacing, write_whole
from eval_protocol_rft.data._format import ROW_GROUP_ROWS, FormatError, metadata_of, reward_columns
from eval_protocol_rft.data.source._arrow import parts_of

_NAMES = {math.inf: "Infinity", -math.inf: "-Infinity"}
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json_values(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column, as msgspec is to encode them."""
    in_utc = column.cast(_replaced(column.type, _in_utc))
    values: list[Any] = in_utc.cast(_replaced(column.type, _spelled)).to_pylist()
    if _all_finite(column):
        return values
    return [_name_floats(value) for value in values]


def from_json_values(values: list[Any], kind: pa.DataType) -> pa.Array:
    """A column of type `kind`, from what a JSON decoder made of its values.

    Raises:
        pa.ArrowInvalid, pa.ArrowTypeError, ValueError, TypeError: a value does not fit.
    """
    if any(_is_spelled(part) for part in parts_of(kind)):
        return pa.array([_read_types(value, kind) for value in values], kind)
    try:
        return pa.array(values, kind)
    except pa.ArrowInvalid:
        if not any(pt.is_floating(part) for part in parts_of(kind)):
            raise
        return pa.array([_read_types(value, kind) for value in values], kind)


def _in_utc(kind: pa.DataType) -> pa.DataType:
    """UTC for all zones: text has the minutes of a zone's offset, and old ones have seconds."""
    if pt.is_timestamp(kind) and kind.tz is not None:
        return pa.timestamp(kind.unit, "UTC")
    return _any_null(kind)


def _spelled(kind: pa.DataType) -> pa.DataType:
    """What a value is spelled as, as far as Arrow's casts do it."""
    if _is_text(kind):
        return pa.string()
    if pt.is_duration(kind):
        return pa.int64()
    if pt.is_float16(kind):
        return pa.float32()
    return _any_null(kind)


def _any_null(kind: pa.DataType) -> pa.DataType:
    """Another type for nulls: Arrow's cast of nested slices to a type of nulls miscounts them."""
    return pa.bool_() if pt.is_null(kind) else kind


def _replaced(kind: pa.DataType, leaf: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """The type with `leaf` of every type that it is made of."""

    def inner(field: pa.Field) -> pa.Field:
        return field.with_type(_replaced(field.type, leaf))

    if pt.is_struct(kind):
        return pa.struct([inner(field) for field in kind])
    if pt.is_map(kind):
        return pa.map_(inner(kind.key_field), inner(kind.item_field))
    if pt.is_fixed_size_list(kind):
        return pa.list_(inner(kind.value_field), kind.list_size)
    if pt.is_large_list(kind):
        return pa.large_list(inner(kind.value_field))
    if pt.is_list(kind):
        return pa.list_(inner(kind.value_field))
    return leaf(kind)


def _read_types(value: Any, kind: pa.DataType) -> Any:
    """A decoded value as what Arrow takes for `kind`."""
    if value is None:
        return None
    if pt.is_struct(kind):
        return {field.name: _read_types(value.get(field.name), field.type) for field in kind}
    if pt.is_map(kind):
        return [
            (_read_types(key, kind.key_type), _read_types(item, kind.item_type))
            for key, item in value
        ]
    if pt.is_nested(kind):
        return [_read_types(item, kind.value_type) for item in value]
    if _is_binary(kind):
        return base64.b64decode(value, validate=True)
    if pt.is_decimal(kind):
        return decimal.Decimal(value)
    # Python's own types have no nanoseconds; Arrow also takes the number behind a time.
    if pt.is_time(kind):
        return pa.scalar(f"1970-01-01 {value}").cast(pa.timestamp(kind.unit)).value
    if _is_text(kind):
        return pa.scalar(value, pa.string()).cast(kind).value
    if pt.is_floating(kind) and isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    return value


def _is_text(kind: pa.DataType) -> bool:
    return any(is_(kind) for is_ in (pt.is_timestamp, pt.is_date, pt.is_time, pt.is_decimal))


def _is_spelled(kind: pa.DataType) -> bool:
    return bool(_is_text(kind) or pt.is_map(kind) or _is_binary(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pt.is_binary(kind)
        or pt.is_large_binary(kind)
        or pt.is_fixed_size_binary(kind)
        or pt.is_binary_view(kind)
    )


def _name_floats(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else _NAMES.get(value, "NaN")
    if isinstance(value, list | tuple):
        return [_name_floats(item) for item in value]
    if isinstance(value, dict):
        return {name: _name_floats(item) for name, item in value.items()}
    return value


def _all_finite(column: pa.ChunkedArray | pa.Array) -> bool:
    """Whether all floats, however deep, are numbers. True where there are none."""
    kind = column.type
    if pt.is_floating(kind):
        return bool(pc.all(pc.is_finite(column), min_count=0).as_py())
    if pt.is_struct(kind):
        return all(_all_finite(pc.struct_field(column, i)) for i in range(kind.num_fields))
    if pt.is_map(kind):
        return not any(pt.is_floating(part) for part in parts_of(kind))
    if pt.is_nested(kind):
        return _all_finite(pc.list_flatten(column))
    return True


_TABLE_BYTES = 16 * 2**20
_BATCH_ROWS = 256
"""Rows that are Python objects at a time."""
_LINE = msgspec.json.Decoder(dict[str, msgspec.Raw])
_VALUE = msgspec.json.Decoder()
_NULL = b"null"


METADATA_SUFFIX = ".metadata.json"


def is_jsonl(path: Path) -> bool:
    """Whether a rollout file of that name holds JSON lines."""
    return path.suffix in (".jsonl", ".ndjson")


def metadata_path(path: Path) -> Path:
    """The file beside `path` that says what its lines hold. Where `path` is a link and there is no
    such file beside it: the one beside the file that it leads to."""
    beside = path.with_name(path.name + METADATA_SUFFIX)
    if path.is_symlink() and not beside.exists():
        target = link_target(path)
        return target.with_name(target.name + METADATA_SUFFIX)
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
    known = {"tools", "episode_metrics", *metrics, *metadata.json_columns}
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
