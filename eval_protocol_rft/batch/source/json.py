"""Data sets in JSON: JSONL (one object per line) and JSON (an array of objects).

Invariant: every row is an object of valid JSON in UTF-8, and numbers keep their kind. NaN and
Infinity are no JSON. Of a key that stands twice in an object the last value counts, as in Python.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import msgspec

from eval_protocol_rft.batch.source.columns import ColumnTypes
from eval_protocol_rft.batch.source.files import FileState, file_fingerprint
from eval_protocol_rft.batch.source.text import (
    BYTE_ORDER_MARK,
    HashedLines,
    RowDecoder,
    RowIndex,
    TextSource,
)
from eval_protocol_rft.batch.source.types import SourceError, SourceFacts

WHITESPACE = b" \t\r\n"
"""What JSON takes for space."""


def open_jsonl(path: Path) -> TextSource:
    """Open a file of one object per line. Blank lines hold no row, but count as lines.

    Raises:
        SourceError: a line is not UTF-8, not JSON or not an object.
    """
    state = FileState.of(path)
    index, types = RowIndex(), ColumnTypes()
    decoder = msgspec.json.Decoder(dict[str, Any])
    with path.open("rb") as file:
        lines = HashedLines(file)
        for line in lines:
            if not line.strip(WHITESPACE):
                continue
            types.add(_decoded(decoder, line, f"{path.name}:{lines.number}"))
            index.starts.append(lines.start)
            index.lines.append(lines.number)
    index.end = lines.end
    columns = types.columns()
    facts = SourceFacts(path.stem, lines.fingerprint(), columns, len(index.starts), files=(state,))
    names = [column.name for column in columns]
    return TextSource(facts, path, index, _row_decoder(names, WHITESPACE))


def open_json(path: Path) -> TextSource:
    """Open a file that is one array of objects.

    While it is opened, about 100 bytes of memory are needed per row; the file itself is mapped, not
    read into memory.

    Raises:
        SourceError: the file is not UTF-8, not JSON, or something else than an array of objects.
    """
    state = FileState.of(path)
    index, types = RowIndex(), ColumnTypes()
    decoder = msgspec.json.Decoder(dict[str, Any])
    if state.size == 0:
        raise SourceError(f"{path.name}: the file is empty, not an array of objects")
    with path.open("rb") as file:
        # Closed when nothing points into it any more, which after an error its traceback may.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = len(BYTE_ORDER_MARK) if content[:3] == BYTE_ORDER_MARK else 0
    sizes = [memoryview(element).nbytes for element in _elements(path, content, start)]
    position = content.find(b"[", start) + 1
    for number, size in enumerate(sizes):
        # Between two elements of valid JSON are one comma and white space, nothing else.
        while content[position] in WHITESPACE + b",":
            position += 1
        row = content[position : position + size]
        types.add(_decoded(decoder, row, f"{path.name}, row {number}"))
        index.starts.append(position)
        position += size
    index.end = position
    columns = types.columns()
    facts = SourceFacts(
        path.stem, file_fingerprint(path), columns, len(index.starts), files=(state,)
    )
    names = [column.name for column in columns]
    return TextSource(facts, path, index, _row_decoder(names, WHITESPACE + b","))


def _elements(path: Path, content: mmap.mmap, start: int) -> list[msgspec.Raw]:
    """The elements of an array as they are written, without space around them."""
    hint = "; where each line is an object the file is JSONL: call it .jsonl"
    try:
        return msgspec.json.decode(memoryview(content)[start:], type=list[msgspec.Raw])
    except msgspec.ValidationError as error:
        raise SourceError(f"{path.name} is not an array of objects: {error}{hint}") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise SourceError(f"{path.name}: {error}{hint}") from error


def _decoded(
    decoder: msgspec.json.Decoder[dict[str, Any]], row: bytes, where: str
) -> dict[str, Any]:
    try:
        return decoder.decode(row)
    except UnicodeDecodeError as error:
        raise SourceError(f"{where}: not UTF-8: {error}") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise SourceError(f"{where}: not a JSON object: {error}") from error


def _row_decoder(names: list[str], after: bytes) -> RowDecoder:
    decoder = msgspec.json.Decoder(dict[str, Any])

    def decode(row: bytes) -> dict[str, Any]:
        found = decoder.decode(row.rstrip(after))
        return {name: found.get(name) for name in names}

    return decode
