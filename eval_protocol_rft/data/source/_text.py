"""Data sets in text files: an index of where each row starts, and rows decoded when asked for.

Invariant: every row was decoded once, and its column types seen, before the first one is handed
out; so a broken line is found before anything is paid for. In memory is the index alone, 16 bytes
a row.

Data sets in CSV or TSV: a header, then records.

Invariant: every value is the text that stands in the file. CSV has no types and no null: "007"
stays "007" and an empty field is an empty text.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.data.source._types import (
    FileState,
    Source,
    SourceColumn,
    SourceError,
    SourceFacts,
    SourceRow,
    joint_fingerprint,
)

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""Ending of a file's name -> Arrow's name of how it is compressed."""
_PIECE_BYTES = 1 << 20
_MOST_OPEN = 64
"""Of a data set's files at a time: a process may have a thousand."""

RowDecoder = Callable[[bytes], dict[str, Any]]
"""From the bytes between a row's start and the next one's to its values by column."""


def plain_name(path: Path) -> Path:
    """The name without the ending that says how the file is compressed."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


class TextFile:
    """One file of a data set in text, compressed or not."""

    def __init__(self, path: Path, label: str) -> None:
        """Raises:
        SourceError: what is compressed is damaged, or has no room where temporary files go.
        """
        self.path = path
        self.label = label
        """How messages call it."""
        self.state = FileState.of(path)
        codec = COMPRESSED.get(path.suffix.lower())
        self._content = None if codec is None else _uncompressed(path, label, codec)

    def open(self) -> BinaryIO:
        """The content, from its start."""
        if self._content is None:
            return self.path.open("rb")
        file = os.fdopen(os.dup(self._content.fileno()), "rb")
        file.seek(0)
        return file


def _uncompressed(path: Path, label: str, codec: str) -> BinaryIO:
    """The content in an unnamed temporary file, so that rows can be had in any order; nothing is
    left behind even by a process that is killed."""
    import pyarrow as pa

    content = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the data set
    with path.open("rb") as file:
        stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec)
        while True:
            try:
                piece = stream.read(_PIECE_BYTES)
            except OSError as error:
                raise SourceError(f"{label}: cannot be decompressed: {error}") from error
            if not piece:
                return content
            try:
                content.write(piece)
                content.flush()
            except OSError as error:
                raise SourceError(
                    f"{label}: it is decompressed into {tempfile.gettempdir()}, and that cannot "
                    f"be written: {error}. Set TMPDIR to a folder with more room"
                ) from error


class HashedLines:
    """The lines of a file, split at newlines alone, while their bytes go into the fingerprint. A
    byte-order mark before the first is left out."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.number = 0
        """1-based number of the line that was given last."""
        self.start = 0
        """Byte at which it starts."""
        self.end = 0
        """Byte after it."""

    def __iter__(self) -> Iterator[bytes]:
        for line in self._file:
            self._hash.update(line)
            self.number += 1
            self.start, self.end = self.end, self.end + len(line)
            if self.number == 1 and line.startswith(BYTE_ORDER_MARK):
                self.start += len(BYTE_ORDER_MARK)
                yield line[len(BYTE_ORDER_MARK) :]
            else:
                yield line

    def fingerprint(self) -> str:
        """Hex SHA-256 of what was read so far."""
        return self._hash.hexdigest()


class RowIndex:
    """Where the rows of a file are."""

    def __init__(self) -> None:
        self.starts = array("q")
        """[num_rows] bytes at which rows start."""
        self.lines = array("q")
        """[num_rows] 1-based numbers of their first lines; empty where lines say nothing."""
        self.end = 0
        """Byte after the last row."""

    def span(self, row: int) -> tuple[int, int]:
        """First byte of a row, and how many there are until the next one starts."""
        start = self.starts[row]
        stop = self.starts[row + 1] if row + 1 < len(self.starts) else self.end
        return start, stop - start

    def where(self, label: str, row: int) -> str:
        """The place of a row, for messages."""
        return f"{label}:{self.lines[row]}" if self.lines else f"{label}, row {row}"


@dataclass(frozen=True, slots=True)
class TextPart:
    """One file of a data set that was read whole."""

    file: TextFile
    index: RowIndex
    fingerprint: str


class TextSource(Source):
    """Rows of one or several text files in their order, reached through their indexes.

    Args:
        name: of the data set.
        parts: the files.
        columns: of all of them.
        decode: gives a row from its bytes.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[TextPart],
        columns: tuple[SourceColumn, ...],
        decode: RowDecoder,
    ) -> None:
        self._parts = tuple(parts)
        self._ends = list(accumulate(len(part.index.starts) for part in parts))
        fingerprint = joint_fingerprint([part.fingerprint for part in parts])
        states = tuple(part.file.state for part in parts)
        super().__init__(SourceFacts(name, fingerprint, columns, self._ends[-1], states))
        self._decode = decode

    def _read(self, order: NDArray[np.int64] | None) -> Iterator[SourceRow]:
        numbers = range(self.num_rows) if order is None else map(int, order)
        with contextlib.ExitStack() as stack:
            opened: dict[int, BinaryIO] = {}
            for number in numbers:
                place = bisect_right(self._ends, number)
                part = self._parts[place]
                row = number - self._ends[place] + len(part.index.starts)
                if place not in opened:
                    if len(opened) >= _MOST_OPEN:
                        opened.pop(next(iter(opened))).close()
                    opened[place] = stack.enter_context(part.file.open())
                start, size = part.index.span(row)
                where = part.index.where(part.file.label, row)
                try:
                    # By place: readers of one content at a time have one position between them.
                    values = self._decode(os.pread(opened[place].fileno(), size, start))
                except ValueError as error:
                    raise SourceError(
                        f"{where}: it has changed since it was opened: {error}"
                    ) from error
                yield SourceRow(number, values, where)


MAX_FIELD_BYTES = 1 << 30
"""Python's own limit, 128 KiB, is less than a long prompt."""
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
    import pyarrow as pa

    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_BYTES))
    parts: list[TextPart] = []
    names: list[str] = []
    for file in files:
        part, header = _part(file, delimiter)
        if parts and header != names:
            raise SourceError(
                f"{file.label} has the columns {', '.join(header)}, but {files[0].label} has "
                f"{', '.join(names)}: files of one data set must have the same, in one order"
            )
        names = header
        parts.append(part)

    def decode(row: bytes) -> dict[str, str]:
        # Lines end at newlines alone, as they did when the file was opened.
        lines = io.StringIO(row.decode("utf-8"), newline="\n")
        record = next(csv.reader(lines, strict=True, delimiter=delimiter))
        return dict(zip(names, record, strict=True))

    columns = tuple(SourceColumn(name, pa.string(), is_json=False) for name in names)
    return TextSource(name, parts, columns, decode)


def _part(file: TextFile, delimiter: str) -> tuple[TextPart, list[str]]:
    """A file that was read whole, and its header."""
    index = RowIndex()
    names: list[str] = []
    with file.open() as content:
        lines = HashedLines(content)
        for start, number, record in _records(file.label, lines, delimiter):
            if not names:
                names = _header(file.label, number, record)
            elif len(record) != len(names):
                raise SourceError(
                    f"{file.label}:{number}: {len(record)} fields where the header has "
                    f"{len(names)}: a field that holds a {_NAMES[delimiter]} or a quote has to be "
                    "quoted"
                )
            else:
                index.starts.append(start)
                index.lines.append(number)
    index.end = lines.end
    if not names:
        raise SourceError(f"{file.label}: the file is empty; its first line must name the columns")
    return TextPart(file, index, lines.fingerprint()), names


def _records(
    label: str, lines: HashedLines, delimiter: str
) -> Iterator[tuple[int, int, list[str]]]:
    """Byte and line at which each record starts, and its fields."""
    reader = csv.reader(_texts(label, lines), strict=True, delimiter=delimiter)
    while True:
        start, number = lines.end, lines.number + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise SourceError(f"{label}:{number}: no {_FORMATS[delimiter]}: {error}") from error
        if record is None:
            return
        if record:
            yield start, number, record


def _texts(label: str, lines: HashedLines) -> Iterator[str]:
    for line in lines:
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"{label}:{lines.number}: not UTF-8: {error}") from error


def _header(label: str, number: int, names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SourceError(f"{label}:{number}: more than one column is called {twice[0]!r}")
    return names
