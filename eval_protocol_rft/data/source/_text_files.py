"""Data sets in text: JSON lines, JSON (an array of objects), CSV and TSV.

Invariant: every row was decoded once, and its column types seen, before the first one is handed
out; so a broken line is found before anything is paid for. In memory is an index of where rows
start alone, 16 bytes a row.

JSON: every row is an object of valid JSON in UTF-8, and numbers keep their kind. NaN and Infinity
are no JSON. Of a key that stands twice in an object the last value counts, as in Python. A column
has a type only if every value fits it exactly: an int never becomes a float, nothing becomes text,
and what has no common type is kept as JSON.

CSV and TSV: every value is the text that stands in the file. They have no types and no null: "007"
stays "007" and an empty field is an empty text.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import mmap
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eval_protocol_rft.data.source._columns import Source, SourceColumn, SourceRow
from eval_protocol_rft.data.source._places import Place, plain_name
from eval_protocol_rft.data.source._urls import SourceError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
WHITESPACE = b" \t\r\n"
"""What JSON takes for space."""
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
MAX_FIELD_BYTES = 1 << 30
"""Of CSV. Python's own limit, 128 KiB, is less than a long prompt."""
_MOST_OPEN = 64
"""Of a data set's files at a time: a process may have a thousand."""

RowDecoder = Callable[[bytes], dict[str, Any]]
"""From the bytes between a row's start and the next one's to its values by column."""


class TextFile:
    """A file and where its rows are; filled while it is read for the first time."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.fingerprint = ""
        self.starts = array("q")
        """[num_rows] bytes at which rows start."""
        self.lines = array("q")
        """[num_rows] 1-based numbers of their first lines; empty where lines say nothing."""
        self.number = 0
        """1-based number of the line that was read last."""
        self.start = 0
        """Byte at which it starts."""
        self.end = 0
        """Byte after it; in the end, after the last row."""

    @property
    def num_rows(self) -> int:
        return len(self.starts)

    def read(self) -> Iterator[bytes]:
        """The lines, split at newlines alone. A byte-order mark before the first is left out."""
        content = hashlib.sha256()
        with self.place.open() as file:
            for line in file:
                content.update(line)
                self.number += 1
                self.start, self.end = self.end, self.end + len(line)
                if self.number == 1 and line.startswith(BYTE_ORDER_MARK):
                    self.start += len(BYTE_ORDER_MARK)
                    yield line.removeprefix(BYTE_ORDER_MARK)
                else:
                    yield line
        self.fingerprint = content.hexdigest()

    def span(self, row: int) -> tuple[int, int]:
        """First byte of a row, and how many there are until the next one starts."""
        start = self.starts[row]
        stop = self.starts[row + 1] if row + 1 < len(self.starts) else self.end
        return start, stop - start

    def where(self, row: int) -> str:
        """The place of a row, for messages."""
        label = self.place.label
        return f"{label}:{self.lines[row]}" if self.lines else f"{label}, row {row}"


class TextSource(Source):
    """Rows of one or several text files in their order, reached through their indexes."""

    def __init__(
        self,
        name: str,
        columns: Sequence[SourceColumn],
        files: Sequence[TextFile],
        decode: RowDecoder,
    ) -> None:
        super().__init__(name, columns, files)
        self._files = files
        self._decode = decode

    def _read(self, order: NDArray[np.int64] | None) -> Iterator[SourceRow]:
        numbers = range(self.num_rows) if order is None else map(int, order)
        with contextlib.ExitStack() as stack:
            opened: dict[int, io.BufferedIOBase] = {}
            for number in numbers:
                place, row = self._find(number)
                file = self._files[place]
                if place not in opened:
                    if len(opened) >= _MOST_OPEN:
                        opened.pop(next(iter(opened))).close()
                    opened[place] = stack.enter_context(file.place.open())
                start, size = file.span(row)
                where = file.where(row)
                try:
                    # By place: readers of one content at a time have one position between them.
                    values = self._decode(os.pread(opened[place].fileno(), size, start))
                except ValueError as error:
                    raise SourceError(
                        f"{where}: it has changed since it was opened: {error}"
                    ) from error
                yield SourceRow(number, values, where)


def open_json(name: str, files: Sequence[TextFile]) -> TextSource:
    """Open files of objects as one data set called `name`: JSONL, or `.json` with one array.

    The columns are those of all files together. Of an array, while it is opened, about 100 bytes of
    memory are needed per row; the file itself is mapped, not read into memory.

    Raises:
        SourceError: a line is not UTF-8, not JSON or not an object; a file is no array of them.
    """
    kinds: dict[str, set[type]] = {}
    for file in files:
        is_array = plain_name(file.place.path).suffix.lower() == ".json"
        (_read_array if is_array else _read_lines)(file, kinds)
    decoder = msgspec.json.Decoder(dict[str, Any])

    def decode(row: bytes) -> dict[str, Any]:
        # What follows a row until the next one starts.
        return decoder.decode(row.rstrip(WHITESPACE + b","))

    return TextSource(name, [column_of(*each) for each in kinds.items()], files, decode)


class _BigInt:
    """Stands for the kind of an int that 64 bits cannot hold."""


def see(row: dict[str, Any], kinds: dict[str, set[type]]) -> None:
    """Take a row's values into account, of which memory grows with columns, not rows."""
    for name, value in row.items():
        kind = type(value)
        if kind is int and not INT64_MIN <= value <= INT64_MAX:
            kind = _BigInt
        try:
            kinds[name].add(kind)
        except KeyError:
            kinds[name] = {kind}


def column_of(name: str, kinds: set[type]) -> SourceColumn:
    """A column of values of these kinds; None is of every type."""
    exact: dict[type, pa.DataType] = {
        str: pa.string(),
        bool: pa.bool_(),
        int: pa.int64(),
        float: pa.float64(),
    }
    kinds = kinds - {type(None)}  # a column of nulls alone is text
    if not kinds:
        return SourceColumn(name, pa.string(), is_json=False)
    type_ = exact.get(next(iter(kinds))) if len(kinds) == 1 else None
    if type_ is None:
        return SourceColumn(name, pa.string(), is_json=True)
    return SourceColumn(name, type_, is_json=False)


def _read_lines(file: TextFile, kinds: dict[str, set[type]]) -> None:
    """A file of one object per line. Blank lines hold no row, but count as lines."""
    decoder = msgspec.json.Decoder(dict[str, Any])
    for line in file.read():
        if line.strip(WHITESPACE):
            see(_decoded(decoder, line, f"{file.place.label}:{file.number}"), kinds)
            file.starts.append(file.start)
            file.lines.append(file.number)


def _read_array(file: TextFile, kinds: dict[str, set[type]]) -> None:
    """A file that is one array of objects."""
    label = file.place.label
    decoder = msgspec.json.Decoder(dict[str, Any])
    with file.place.open() as opened:
        if os.fstat(opened.fileno()).st_size == 0:
            raise SourceError(f"{label}: the file is empty, not an array of objects")
        # Closed when nothing points into it any more, which after an error its traceback may.
        content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    start = len(BYTE_ORDER_MARK) if content[:3] == BYTE_ORDER_MARK else 0
    sizes = [memoryview(element).nbytes for element in _elements(label, content, start)]
    position = content.find(b"[", start) + 1
    for number, size in enumerate(sizes):
        # Between two elements of valid JSON are one comma and white space, nothing else.
        while content[position] in WHITESPACE + b",":
            position += 1
        row = content[position : position + size]
        see(_decoded(decoder, row, f"{label}, row {number}"), kinds)
        file.starts.append(position)
        position += size
    file.end = position
    file.fingerprint = hashlib.sha256(content).hexdigest()


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


_NAMES = {",": "comma", "\t": "tab"}
_FORMATS = {",": "CSV", "\t": "TSV"}


def open_csv(name: str, files: Sequence[TextFile], *, delimiter: str) -> TextSource:
    """Open files of records with a header, fields in double quotes where need be, as one data set
    called `name`. Blank lines hold no row.

    Args:
        name: of the data set.
        files: all with the same header.
        delimiter: a comma, or a tab for TSV.

    Raises:
        SourceError: a file has no header, another than the first, a name twice, a broken quote, is
            not UTF-8, or a record has more or fewer fields than the header.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_BYTES))
    headers = [_read_records(file, delimiter) for file in files]
    names = headers[0]
    for file, header in zip(files, headers, strict=True):
        if header != names:
            raise SourceError(
                f"{file.place.label} has the columns {', '.join(header)}, but "
                f"{files[0].place.label} has {', '.join(names)}: files of one data set must have "
                "the same, in one order"
            )

    def decode(row: bytes) -> dict[str, str]:
        # Lines end at newlines alone, as they did when the file was opened.
        lines = io.StringIO(row.decode("utf-8"), newline="\n")
        record = next(csv.reader(lines, strict=True, delimiter=delimiter))
        return dict(zip(names, record, strict=True))

    columns = [SourceColumn(name, pa.string(), is_json=False) for name in names]
    return TextSource(name, columns, files, decode)


def _read_records(file: TextFile, delimiter: str) -> list[str]:
    """Find the records of a file; returns its header."""
    label = file.place.label
    names: list[str] = []
    reader = csv.reader(_texts(file), strict=True, delimiter=delimiter)
    while True:
        start, number = file.end, file.number + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise SourceError(f"{label}:{number}: no {_FORMATS[delimiter]}: {error}") from error
        if record is None:
            break
        if not record:
            continue
        if not names:
            names = record
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise SourceError(f"{label}:{number}: more than one column is called {twice[0]!r}")
        elif len(record) != len(names):
            raise SourceError(
                f"{label}:{number}: {len(record)} fields where the header has {len(names)}: a "
                f"field that holds a {_NAMES[delimiter]} or a quote has to be quoted"
            )
        else:
            file.starts.append(start)
            file.lines.append(number)
    if not names:
        raise SourceError(f"{label}: the file is empty; its first line must name the columns")
    return names


def _texts(file: TextFile) -> Iterator[str]:
    for line in file.read():
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"{file.place.label}:{file.number}: not UTF-8: {error}") from error
