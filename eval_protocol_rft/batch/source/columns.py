"""Column types of formats that have none, from all of their values.

Invariant: a type is given only if every value of the column fits it exactly. An int never becomes a
float and nothing becomes text by conversion; what has no common type is kept as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from eval_protocol_rft.batch.source.types import SourceColumn

if TYPE_CHECKING:
    import pyarrow as pa

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1


class _BigInt:
    """Stands for the kind of an int that 64 bits cannot hold."""


class ColumnTypes:
    """Sees row after row and knows the columns in the end. Memory grows with columns, not rows."""

    def __init__(self) -> None:
        self._kinds: dict[str, set[type]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Take a row into account. A key that it lacks counts as a null."""
        kinds = self._kinds
        for name, value in row.items():
            kind = type(value)
            if kind is int and not INT64_MIN <= value <= INT64_MAX:
                kind = _BigInt
            try:
                kinds[name].add(kind)
            except KeyError:
                kinds[name] = {kind}

    def columns(self) -> tuple[SourceColumn, ...]:
        """The columns in order of first appearance. One of nulls alone is text."""
        return tuple(_column(name, kinds) for name, kinds in self._kinds.items())


def _column(name: str, kinds: set[type]) -> SourceColumn:
    import pyarrow as pa

    exact: dict[type, pa.DataType] = {
        str: pa.string(),
        bool: pa.bool_(),
        int: pa.int64(),
        float: pa.float64(),
    }
    kinds = kinds - {type(None)}
    if not kinds:
        return SourceColumn(name, pa.string(), is_json=False)
    type_ = exact.get(next(iter(kinds))) if len(kinds) == 1 else None
    if type_ is None:
        return SourceColumn(name, pa.string(), is_json=True)
    return SourceColumn(name, type_, is_json=False)
