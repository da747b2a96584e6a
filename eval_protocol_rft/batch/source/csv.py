"""Data sets in CSV: a header, then records.

Invariant: every value is the text that stands in the file. CSV has no types and no null: "007"
stays "007" and an empty field is an empty text.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from eval_protocol_rft.batch.source.files import FileState
from eval_protocol_rft.batch.source.text import HashedLines, RowDecoder, RowIndex, TextSource
from eval_protocol_rft.batch.source.types import SourceColumn, SourceError, SourceFacts

MAX_FIELD_BYTES = 1 << 30
"""Python's own limit, 128 KiB, is less than a long prompt."""


def open_csv(path: Path) -> TextSource:
    """Open a CSV file with commas, double quotes and a header. Blank lines hold no row.

    Raises:
        SourceError: the file has no header, a name twice, a broken quote, is not UTF-8, or a record
            has more or fewer fields than the header.
    """
    import pyarrow as pa

    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_BYTES))
    state = FileState.of(path)
    index = RowIndex()
    names: list[str] = []
    with path.open("rb") as file:
        lines = HashedLines(file)
        for start, number, record in _records(path, lines):
            if not names:
                names = _header(path, number, record)
            elif len(record) != len(names):
                raise SourceError(
                    f"{path.name}:{number}: {len(record)} fields where the header has "
                    f"{len(names)}: a field that holds a comma or a quote has to be quoted"
                )
            else:
                index.starts.append(start)
                index.lines.append(number)
    index.end = lines.end
    if not names:
        raise SourceError(f"{path.name}: the file is empty; its first line must name the columns")
    columns = tuple(SourceColumn(name, pa.string(), is_json=False) for name in names)
    facts = SourceFacts(path.stem, lines.fingerprint(), columns, len(index.starts), (state,))
    return TextSource(facts, path, index, _row_decoder(names))


def _records(path: Path, lines: HashedLines) -> Iterator[tuple[int, int, list[str]]]:
    """Byte and line at which each record starts, and its fields."""
    reader = csv.reader(_texts(path, lines), strict=True)
    while True:
        start, number = lines.end, lines.number + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise SourceError(f"{path.name}:{number}: no CSV: {error}") from error
        if record is None:
            return
        if record:
            yield start, number, record


def _texts(path: Path, lines: HashedLines) -> Iterator[str]:
    for line in lines:
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"{path.name}:{lines.number}: not UTF-8: {error}") from error


def _header(path: Path, number: int, names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SourceError(f"{path.name}:{number}: more than one column is called {twice[0]!r}")
    return names


def _row_decoder(names: list[str]) -> RowDecoder:
    def decode(row: bytes) -> dict[str, str]:
        # Lines end at newlines alone, as they did when the file was opened.
        record = next(csv.reader(io.StringIO(row.decode("utf-8"), newline="\n"), strict=True))
        return dict(zip(names, record, strict=True))

    return decode
