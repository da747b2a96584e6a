"""What JSON does to columns, both ways.

Invariant: values of a column that is read from JSON come out of the file as they were in the JSON;
values that JSON cannot hold are found before, or counted while, they are written as JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

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
