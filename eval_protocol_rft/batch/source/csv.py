"""Data sets in CSV or TSV: a header, then records.

Invariant: every value is the text that stands in the file. CSV has no types and no null: "007"
stays "007" and an empty field is an empty text.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from eval_protocol_rft.batch.source.text import (
    HashedLines,
    RowIndex,
    TextFile,
    TextPart,
    TextSource,
)
from eval_protocol_rft.batch.source.types import SourceColumn, SourceError

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
