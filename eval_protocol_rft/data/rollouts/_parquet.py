"""How rollouts are laid out in Parquet: encodings, compression, row groups.

Invariant: a row group is small enough to be read whole wherever rollouts are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eval_protocol_rft._durable import DurableFile
from eval_protocol_rft.data.rollouts._format import ARRAY_COLUMNS, FormatError

ROW_GROUP_ROWS = 4096
ROW_GROUP_TOKENS = 2_000_000
"""Prompt and sampled tokens: some 30 MB in memory with raw logprobs."""
_BUFFER_BYTES = 1 << 20
_LEVEL = 1
"""Of zstd. Level 3 takes half as long again for 1 % less (benchmarks/store.py)."""


def writer(file: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """A Parquet writer for rollouts."""
    # Ids plain: of running text, a dictionary makes the file 9 % larger and takes longer, and byte
    # stream split makes it 3 % larger and is unknown to readers from before 2024. Of logprobs it
    # saves 9 % of their bytes. Loss masks are runs, which a dictionary's indices are stored as.
    plain = [f"{name}.list.element" for name in ARRAY_COLUMNS]
    nested = ("segment_tokens", "segment_logprobs")
    plain += [f"{name}.list.element.list.element" for name in nested]
    names = [path for field in schema for path in _leaves(field.name, field.type)]
    floats = [name for name in plain if "logprobs." in name]
    numbers = ("data_idx", "sample_idx", "reward")
    return pq.ParquetWriter(
        file,
        schema,
        compression="zstd",
        compression_level=_LEVEL,
        use_dictionary=[name for name in names if name not in plain],
        use_byte_stream_split=[name for name in floats if name in names],
        write_statistics=[name for name in numbers if name in names],
    )


def write_tables(file: DurableFile, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write a whole Parquet file into `file`; returns the number of rows."""
    rows = 0
    # Pages of short columns are a few bytes each.
    stream = pa.BufferedOutputStream(pa.PythonFile(_Sink(file), mode="w"), _BUFFER_BYTES)
    try:
        with writer(stream, schema) as target:
            for table in row_groups(tables):
                target.write_table(table, row_group_size=len(table))
                rows += len(table)
    finally:
        # Writes what is left, and leaves the file open: it would be closed when Arrow tries.
        stream.detach()
    return rows


class _Sink:
    """A file for Arrow. After a write that failed it takes everything and keeps nothing: Arrow
    tries once more when it lets go of its buffer, and would print that as a traceback of its own.
    """

    closed = False

    def __init__(self, file: DurableFile) -> None:
        self._file: DurableFile | None = file

    def write(self, data: bytes | memoryview) -> int:
        if self._file is None:
            return len(data)
        try:
            return self._file.write(data)
        except OSError:
            self._file = None
            raise

    def flush(self) -> None:
        """Nothing is buffered here."""

    def close(self) -> None:
        """The file is its owner's to close."""

    def tell(self) -> int:
        return 0 if self._file is None else self._file.tell()


def row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of the size of a row group."""
    held: list[pa.Table] = []
    rows = tokens = 0
    for table in tables:
        for piece in _pieces(table):
            size = count_tokens(piece)
            if held and (rows + len(piece) > ROW_GROUP_ROWS or tokens + size > ROW_GROUP_TOKENS):
                yield pa.concat_tables(held)
                held, rows, tokens = [], 0, 0
            held.append(piece)
            rows, tokens = rows + len(piece), tokens + size
    if held:
        yield pa.concat_tables(held)


def count_tokens(table: pa.Table | pa.RecordBatch) -> int:
    """Tokens of all prompts, completions and segments that are among the columns."""
    total = 0
    for name in _TOKENS.intersection(table.schema.names):
        column = table.column(name)
        for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
            lists = chunk.flatten() if pa.types.is_list(chunk.type.value_type) else chunk
            total += lists.offsets[-1].as_py() - lists.offsets[0].as_py()
    return total


_TOKENS = frozenset({"prompt_ids", "completion_ids", "segment_tokens"})


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises:
        FormatError: it is no whole Parquet file.
    """
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise FormatError(f"{path}: not a whole Parquet file: {error}") from error


def read_row_groups(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The tables of a rollout file, one at a time, none of them empty.

    Raises:
        FormatError: the file is broken; the message names the row group.
    """
    with open_parquet(path) as file:
        for i in range(file.num_row_groups):
            try:
                table = file.read_row_group(i, columns=columns, use_threads=False)
            except (pa.ArrowInvalid, OSError) as error:
                raise FormatError(f"{path}: row group {i} is broken: {error}") from error
            if len(table):
                yield table


def _pieces(table: pa.Table) -> Iterator[pa.Table]:
    """Halves of halves, until each fits a row group."""
    if len(table) > 1 and (len(table) > ROW_GROUP_ROWS or count_tokens(table) > ROW_GROUP_TOKENS):
        half = len(table) // 2
        yield from _pieces(table.slice(0, half))
        yield from _pieces(table.slice(half))
    elif len(table):
        yield table


def _leaves(path: str, kind: pa.DataType) -> Iterator[str]:
    """Parquet's names of the columns under an Arrow column."""
    if pa.types.is_struct(kind):
        for field in kind:
            yield from _leaves(f"{path}.{field.name}", field.type)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _leaves(f"{path}.list.element", kind.value_type)
    else:
        yield path
