"""Data sets in Arrow's types: Parquet files, and Arrow files of Hugging Face `datasets`.

Invariant: values have the file's own types, made plain: a plain type holds the same values, and
Python values of it can be stored again without loss. Where that cannot be had, the column is
refused. Rows are in memory a batch at a time, in whichever order they are asked for.
"""

from __future__ import annotations

import itertools
import mmap
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eval_protocol_rft.data.source._columns import Source, SourceColumn, SourceRow, without_nulls
from eval_protocol_rft.data.source._places import Place
from eval_protocol_rft.data.source._urls import SourceError


def plain_schema(label: str, schema: pa.Schema) -> pa.Schema:
    """The columns of `schema` in plain types: without dictionaries, extensions,
    views and metadata.

    Raises:
        SourceError: two columns have one name, or a column cannot be read without loss.
    """
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise SourceError(f"{label}: more than one column is called {name!r}")
    fields = []
    for field in schema:
        plain = plain_type(field.type)
        if not _is_lossless(field.type, plain):
            raise SourceError(
                f"{label}: column {field.name!r} is {field.type}, which cannot be read without "
                "loss: drop it, or cast it to a simpler type"
            )
        fields.append(pa.field(field.name, plain))
    return pa.schema(fields)


def plain_type(type_: pa.DataType) -> pa.DataType:
    """The type without dictionaries and extensions, and without views of text, which Arrow can
    store and cannot sort or select from."""
    if isinstance(type_, pa.BaseExtensionType):
        return plain_type(type_.storage_type)
    if pa.types.is_dictionary(type_):
        return plain_type(type_.value_type)
    if pa.types.is_string_view(type_):
        return pa.string()
    if pa.types.is_binary_view(type_):
        return pa.binary()
    if pa.types.is_list(type_):
        return pa.list_(_plain_field(type_.value_field))
    if pa.types.is_large_list(type_):
        return pa.large_list(_plain_field(type_.value_field))
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(_plain_field(type_.value_field), type_.list_size)
    if pa.types.is_map(type_):
        key, item = _plain_field(type_.key_field), _plain_field(type_.item_field)
        return pa.map_(key, item, keys_sorted=type_.keys_sorted)
    if pa.types.is_struct(type_):
        return pa.struct([_plain_field(type_.field(i)) for i in range(type_.num_fields)])
    return type_


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(plain_type(field.type))


def _is_lossless(type_: pa.DataType, plain: pa.DataType) -> bool:
    if any(pa.types.is_union(t) or t == pa.time64("ns") for t in parts_of(plain)):
        # Python's time of day has microseconds, and a union forgets which of its types it was.
        return False
    if any(map(_is_list_view, parts_of(type_))):
        # A cast of a slice of them fails, and inside another type it loses values (Arrow 26).
        return False
    try:
        # What Arrow lacks fails on no rows just as on many. Rows are sorted when a file is made.
        pa.schema([("column", type_)]).empty_table().cast(pa.schema([("column", plain)]))
        pa.array([], plain).take(pa.array([], pa.int64()))
    except pa.ArrowException:
        return False
    return True


def _is_list_view(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list_view(type_) or pa.types.is_large_list_view(type_))


def parts_of(type_: pa.DataType) -> Iterator[pa.DataType]:
    """A type and everything nested in it."""
    yield type_
    for i in range(type_.num_fields):
        yield from parts_of(type_.field(i).type)


BATCH_ROWS = 512
"""Rows that are Python objects at a time: enough that reading a batch costs little per row, few
enough that long conversations fit."""


class ArrowFile:
    """A Parquet file, or an Arrow stream as `datasets` writes them.

    Raises:
        SourceError: it is not readable as what its name says, or a column cannot be read without
            loss.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._is_stream = place.path.suffix == ".arrow"
        try:
            if self._is_stream:
                with self._stream() as stream:
                    schema = stream.schema
                    self.num_rows = sum(batch.num_rows for batch in stream)
            else:
                with self._parquet() as file:
                    schema, self.num_rows = file.schema_arrow, file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            kind = "an Arrow stream" if self._is_stream else "Parquet"
            raise SourceError(f"{place.label} cannot be read as {kind}: {error}") from error
        self.schema = plain_schema(place.label, schema)
        self.fingerprint = place.fingerprint()

    def _stream(self) -> pa.ipc.RecordBatchStreamReader:
        file = self.place.arrow_file()
        return pa.ipc.open_stream(pa.memory_map(file) if isinstance(file, str) else file)

    def _parquet(self) -> pq.ParquetFile:
        file = self.place.arrow_file()
        return pq.ParquetFile(file if isinstance(file, str) else pa.BufferReader(file))

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Of at most `BATCH_ROWS` rows, in plain types.

        Raises:
            SourceError: it is damaged.
        """
        count = 0
        try:
            with self._stream() if self._is_stream else self._parquet() as file:
                for batch in file if self._is_stream else file.iter_batches(BATCH_ROWS):
                    for first in range(0, batch.num_rows, BATCH_ROWS):
                        yield batch.slice(first, BATCH_ROWS).cast(self.schema)
                    count += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise SourceError(
                f"{self.place.label}: cannot be read after row {count}: {error}"
            ) from error


class ArrowSource(Source):
    """Rows of one or several files, in their order."""

    def __init__(self, name: str, files: Sequence[ArrowFile], watched: Sequence[Place]) -> None:
        self._schema = files[0].schema
        for file in files[1:]:
            _refuse_other_schema(files[0], file)
        columns = [SourceColumn(field.name, field.type, is_json=False) for field in self._schema]
        super().__init__(name, columns, files, watched)
        self._files = files

    def _read(self, order: NDArray[np.int64] | None) -> Iterator[SourceRow]:
        if order is None:
            start = 0
            for batch in self._batches():
                yield from self._rows(batch, start)
                start += batch.num_rows
            return
        copy = _UncompressedCopy(self.name, self._schema, self._batches())
        for number in map(int, order):
            yield from self._rows(copy.row(number), number)

    def _read_own(self) -> Iterator[SourceRow]:
        for row in self._read(None):
            yield SourceRow(row.data_idx, without_nulls(row.values), row.where)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        return itertools.chain.from_iterable(file.batches() for file in self._files)

    def _rows(self, batch: pa.RecordBatch, start: int) -> Iterator[SourceRow]:
        """The rows of a batch, the first of which is number `start` of the data set."""
        for i, values in enumerate(self._values(batch, start), start):
            yield SourceRow(i, values, self._where(i))

    def _values(self, batch: pa.RecordBatch, start: int) -> list[dict[str, Any]]:
        try:
            rows: list[dict[str, Any]] = batch.to_pylist()
        except (pa.ArrowException, ValueError, OverflowError) as error:
            if batch.num_rows > 1:
                return [self._values(batch.slice(i, 1), start + i)[0] for i in range(len(batch))]
            raise SourceError(
                f"{self._where(start)}: a value that Python cannot hold: {error}"
            ) from error
        return rows

    def _where(self, number: int) -> str:
        place, row = self._find(number)
        return f"{self._files[place].place.label}, row {row}"


class _UncompressedCopy:
    """A data set's rows in any order, from an unnamed temporary file that is mapped into memory.

    The file has no name, so nothing is left behind even by a process that is killed.
    """

    def __init__(self, name: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
        sizes = []
        with tempfile.TemporaryFile() as file:
            with pa.ipc.new_file(file, schema) as writer:
                for batch in batches:
                    _write(name, writer, batch)
                    sizes.append(batch.num_rows)
            file.flush()
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._reader = pa.ipc.open_file(pa.py_buffer(content))
        self._ends = list(accumulate(sizes))

    def row(self, number: int) -> pa.RecordBatch:
        """A batch of one row."""
        place = bisect_right(self._ends, number)
        batch = self._reader.get_batch(place)
        return batch.slice(number - self._ends[place] + batch.num_rows, 1)


def _write(name: str, writer: pa.RecordBatchWriter, batch: pa.RecordBatch) -> None:
    try:
        writer.write_batch(batch)
    except OSError as error:
        raise SourceError(
            f"{name}: to shuffle, an uncompressed copy is made in {tempfile.gettempdir()}, and it "
            f"cannot be written: {error}. Set TMPDIR to a folder with more room"
        ) from error


def _refuse_other_schema(first: ArrowFile, file: ArrowFile) -> None:
    schema, other = first.schema, file.schema
    label, first_label = file.place.label, first.place.label
    if other.names != schema.names:
        raise SourceError(
            f"{label} has the columns {', '.join(other.names)}, but {first_label} has "
            f"{', '.join(schema.names)}: files of one folder must have the same, in one order"
        )
    for mine, theirs in zip(schema, other, strict=True):
        if mine.type != theirs.type:
            raise SourceError(
                f"{label}: column {mine.name!r} is {theirs.type}, but {mine.type} in "
                f"{first_label}: files of one folder must have the same types"
            )
