"""Data sets in text files: an index of where each row starts, and rows decoded when asked for.

Invariant: every row was decoded once, and its column types seen, before the first one is handed
out; so a broken line is found before anything is paid for. In memory is the index alone, 16 bytes
a row.
"""

from __future__ import annotations

import contextlib
import hashlib
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

from eval_protocol_rft.batch.source.files import FileState, joint_fingerprint
from eval_protocol_rft.batch.source.types import (
    Source,
    SourceColumn,
    SourceError,
    SourceFacts,
    SourceRow,
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
