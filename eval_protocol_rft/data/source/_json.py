"""Data sets in JSON: JSONL (one object per line) and JSON (an array of objects).

Invariant: every row is an object of valid JSON in UTF-8, and numbers keep their kind. NaN and
Infinity are no JSON. Of a key that stands twice in an object the last value counts, as in Python.

Column types of formats that have none, from all of their values.

Invariant: a type is given only if every value of the column fits it exactly. An int never becomes a
float and nothing becomes text by conversion; what has no common type is kept as JSON.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from eval_protocol_rft.data.source._text import (
    BYTE_ORDER_MARK,
    HashedLines,
    RowIndex,
    TextFile,
    TextPart,
    TextSource,
    plain_name,
)
from eval_protocol_rft.data.source._types import SourceColumn, SourceError

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


WHITESPACE = b" \t\r\n"
"""What JSON takes for space."""


def open_json(name: str, files: Sequence[TextFile]) -> TextSource:
    """Open files of objects as one data set called `name`: JSONL, or `.json` with one array.

    The columns are those of all files together. Of an array, while it is opened, about 100 bytes of
    memory are needed per row; the file itself is mapped, not read into memory.

    Raises:
        SourceError: a line is not UTF-8, not JSON or not an object; a file is no array of them.
    """
    types = ColumnTypes()
    parts = []
    for file in files:
        is_array = plain_name(file.path).suffix.lower() == ".json"
        parts.append((_array_part if is_array else _lines_part)(file, types))
    decoder = msgspec.json.Decoder(dict[str, Any])

    def decode(row: bytes) -> dict[str, Any]:
        # What follows a row until the next one starts.
        return decoder.decode(row.rstrip(WHITESPACE + b","))

    return TextSource(name, parts, types.columns(), decode)


def _lines_part(file: TextFile, types: ColumnTypes) -> TextPart:
    """A file of one object per line. Blank lines hold no row, but count as lines."""
    index = RowIndex()
    decoder = msgspec.json.Decoder(dict[str, Any])
    with file.open() as content:
        lines = HashedLines(content)
        for line in lines:
            if not line.strip(WHITESPACE):
                continue
            types.add(_decoded(decoder, line, f"{file.label}:{lines.number}"))
            index.starts.append(lines.start)
            index.lines.append(lines.number)
    index.end = lines.end
    return TextPart(file, index, lines.fingerprint())


def _array_part(file: TextFile, types: ColumnTypes) -> TextPart:
    """A file that is one array of objects."""
    index = RowIndex()
    decoder = msgspec.json.Decoder(dict[str, Any])
    with file.open() as opened:
        if os.fstat(opened.fileno()).st_size == 0:
            raise SourceError(f"{file.label}: the file is empty, not an array of objects")
        # Closed when nothing points into it any more, which after an error its traceback may.
        content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    start = len(BYTE_ORDER_MARK) if content[:3] == BYTE_ORDER_MARK else 0
    sizes = [memoryview(element).nbytes for element in _elements(file.label, content, start)]
    position = content.find(b"[", start) + 1
    for number, size in enumerate(sizes):
        # Between two elements of valid JSON are one comma and white space, nothing else.
        while content[position] in WHITESPACE + b",":
            position += 1
        row = content[position : position + size]
        types.add(_decoded(decoder, row, f"{file.label}, row {number}"))
        index.starts.append(position)
        position += size
    index.end = position
    return TextPart(file, index, hashlib.sha256(content).hexdigest())


def _elements(label: str, content: mmap.mmap, start: int) -> list[msgspec.Raw]:
    """The elements of an array as they are written, without space around them."""
    hint = "; where each line is an object the file is JSONL: call it .jsonl"
    try:
        return msgspec.json.decode(memoryview(content)[start:], type=list[msgspec.Raw])
    except msgspec.ValidationError as error:
        raise SourceError(f"{label} is not an array of objects: {error}{hint}") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise SourceError(f"{label}: {error}{hint}") from error


def _decoded(
    decoder: msgspec.json.Decoder[dict[str, Any]], row: bytes, where: str
) -> dict[str, Any]:
    try:
        return decoder.decode(row)
    except UnicodeDecodeError as error:
        raise SourceError(f"{where}: not UTF-8: {error}") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise SourceError(f"{where}: not a JSON object: {error}") from error
