"""Arrow values as JSON and back: how a line spells what JSON has no type for.

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
import decimal
import math
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

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
    if any(_is_spelled(part) for part in _parts(kind)):
        return pa.array([_read(value, kind) for value in values], kind)
    try:
        return pa.array(values, kind)
    except pa.ArrowInvalid:
        if not any(pt.is_floating(part) for part in _parts(kind)):
            raise
        return pa.array([_read(value, kind) for value in values], kind)


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


def _read(value: Any, kind: pa.DataType) -> Any:
    """A decoded value as what Arrow takes for `kind`."""
    if value is None:
        return None
    if pt.is_struct(kind):
        return {field.name: _read(value.get(field.name), field.type) for field in kind}
    if pt.is_map(kind):
        return [(_read(key, kind.key_type), _read(item, kind.item_type)) for key, item in value]
    if pt.is_nested(kind):
        return [_read(item, kind.value_type) for item in value]
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
        return not any(pt.is_floating(part) for part in _parts(kind))
    if pt.is_nested(kind):
        return _all_finite(pc.list_flatten(column))
    return True


def _parts(kind: pa.DataType) -> Iterator[pa.DataType]:
    """A type and everything nested in it."""
    yield kind
    for i in range(kind.num_fields):
        yield from _parts(kind.field(i).type)
