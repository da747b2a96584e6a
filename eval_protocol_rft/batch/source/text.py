"""Data sets in text files: an index of where each row starts, and rows decoded when asked for.

Invariant: every row was decoded once, and its column types seen, before the first one is handed
out; so a broken line is found before anything is paid for. In memory is the index alone, 16 bytes
a row.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.batch.source.types import Source, SourceError, SourceFacts, SourceRow

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

RowDecoder = Callable[[bytes], dict[str, Any]]
"""From the bytes between a row's start and the next one's to a value for every column."""


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


class TextSource(Source):
    """Rows of one text file, reached through an index."""

    def __init__(self, facts: SourceFacts, path: Path, index: RowIndex, decode: RowDecoder) -> None:
        super().__init__(facts)
        self._path = path
        self._index = index
        self._decode = decode

    def _read(self, order: NDArray[np.int64] | None) -> Iterator[SourceRow]:
        numbers = range(self.num_rows) if order is None else map(int, order)
        with self._path.open("rb") as file:
            for number in numbers:
                start, size = self._index.span(number)
                file.seek(start)
                where = self._where(number)
                try:
                    values = self._decode(file.read(size))
                except ValueError as error:
                    raise SourceError(
                        f"{where}: it has changed since it was opened: {error}"
                    ) from error
                yield SourceRow(number, values, where)

    def _where(self, number: int) -> str:
        if self._index.lines:
            return f"{self._path.name}:{self._index.lines[number]}"
        return f"{self._path.name}, row {number}"
