"""Rows of a rollout file as Arrow tables, and in Parquet: encodings, compression, row groups.

Invariant: a row that came through Arrow equals the one that went in, value by value; logprobs are
float32 there and here. A row group is small enough to be read whole wherever rollouts are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from eval_protocol_rft._durable import DurableFile
from eval_protocol_rft.data import _episodes as episodes
from eval_protocol_rft.data import _format as file_format
from eval_protocol_rft.data._format import CompletionRow, FileMetadata, FormatError
from eval_protocol_rft.data.source._columns import without_nulls
from eval_protocol_rft.record import UNSCORED, Score

T = TypeVar("T")
_PLAIN = (
    "row_id", "data_idx", "sample_idx", "response", "finish_reason", "truncated", "temperature",
    "top_p", "top_k", "max_tokens", "seed", "policy_version", "first_policy_version", "attempts",
    "seconds", "began_at", "request_id", "error", "error_kind", "error_status", "evaluation_row",
)  # fmt: skip
"""Fields that are columns as they are."""


def to_record_batch(rows: Sequence[CompletionRow], schema: pa.Schema) -> pa.RecordBatch:
    """Rows as one Arrow batch of `schema`, which `format.schema` made.

    Raises:
        pa.ArrowInvalid, pa.ArrowTypeError: a value does not fit its column.
    """
    metadata = file_format.metadata_of(schema)
    json_columns = frozenset(metadata.json_columns)
    has_episodes = "turns" in schema.names
    columns: dict[str, pa.Array] = episodes.episode_arrays(rows) if has_episodes else {}
    for field in schema:
        name, kind = field.name, field.type
        if name in _PLAIN:
            columns[name] = pa.array([getattr(row, name) for row in rows], kind)
        elif name in file_format.ARRAY_COLUMNS:
            columns[name] = episodes.list_array([getattr(row, name) for row in rows], kind)
        elif name == "prompt":
            columns[name] = pa.array([row.prompt for row in rows], kind)
        elif name in ("tools", "message"):
            columns[name] = _json_array([getattr(row, name) for row in rows])
        elif name == "ground_truth":
            truths = [row.ground_truth for row in rows]
            columns[name] = _json_array(truths) if name in json_columns else pa.array(truths, kind)
        elif name.startswith(file_format.ORIGINAL_PREFIX):
            key = name.removeprefix(file_format.ORIGINAL_PREFIX)
            values = [row.original.get(key) for row in rows]
            columns[name] = _json_array(values) if name in json_columns else pa.array(values, kind)
    for reward in ("reward", *metadata.rewards):
        scores = [row.scores.get(reward, UNSCORED) for row in rows]
        number, reason, metrics, error = file_format.reward_columns(reward)
        columns[number] = pa.array([score.reward for score in scores], pa.float64())
        columns[reason] = pa.array([score.reason for score in scores], pa.string())
        columns[metrics] = _json_array([score.metrics for score in scores])
        columns[error] = pa.array([score.error for score in scores], pa.string())
    return pa.RecordBatch.from_arrays([columns[field.name] for field in schema], schema=schema)


def from_record_batch(
    batch: pa.RecordBatch | pa.Table, metadata: FileMetadata, *, where: str = "a rollout file"
) -> list[CompletionRow]:
    """The rows of a batch. Columns that the format does not know are left out.

    Raises:
        FormatError: token data lacks a number, or a column of JSON text holds none; the message
            begins with `where`.
    """
    try:
        return _from_record_batch(batch, metadata)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error


def _from_record_batch(
    batch: pa.RecordBatch | pa.Table, metadata: FileMetadata
) -> list[CompletionRow]:
    names = frozenset(batch.schema.names)
    size = batch.num_rows
    fields: dict[str, list[Any]] = {
        name: batch.column(name).to_pylist() for name in _PLAIN if name in names
    }
    fields["prompt"] = _prompts(batch.column("prompt"))
    for name in file_format.ARRAY_COLUMNS:
        fields[name] = episodes.arrays_of(batch.column(name)) if name in names else [None] * size
    json_columns = frozenset(metadata.json_columns)
    for name in ("tools", "message"):
        fields[name] = _from_json(batch, name) if name in names else [None] * size
    if "ground_truth" in names:
        fields["ground_truth"] = _values(batch, "ground_truth", json_columns)
    fields["scores"] = _scores(batch, metadata, names)
    keys = [name for name in batch.schema.names if name.startswith(file_format.ORIGINAL_PREFIX)]
    originals = [_values(batch, name, json_columns) for name in keys]
    stripped = [key.removeprefix(file_format.ORIGINAL_PREFIX) for key in keys]
    fields["original"] = (
        [dict(zip(stripped, values, strict=True)) for values in zip(*originals, strict=True)]
        if keys
        else [{} for _ in range(size)]
    )
    if not names.isdisjoint(file_format.EPISODE_COLUMNS):
        fields |= episodes.episodes_in(batch)
    order = list(fields)
    rows = [
        CompletionRow(**dict(zip(order, values, strict=True)))
        for values in zip(*fields.values(), strict=True)
    ]
    episodes.put_stored(rows)
    return rows


def _prompts(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    if column.type != file_format.MESSAGES:
        return list(column.to_pylist())
    return [
        None if messages is None else without_nulls(messages) for messages in column.to_pylist()
    ]


def _scores(
    batch: pa.RecordBatch | pa.Table, metadata: FileMetadata, names: frozenset[str]
) -> list[dict[str, Score]]:
    scores: list[dict[str, Score]] = [{} for _ in range(batch.num_rows)]
    for reward in {"reward": None, **dict.fromkeys(metadata.rewards)}:
        number, reason, metrics, error = file_format.reward_columns(reward)
        if number not in names:
            continue
        parts = (
            batch.column(number).to_pylist(),
            batch.column(reason).to_pylist(),
            _from_json(batch, metrics),
            batch.column(error).to_pylist(),
        )
        for own, (value, why, further, problem) in zip(
            scores, zip(*parts, strict=True), strict=True
        ):
            if not value is why is further is problem is None:
                own[reward] = Score(reward=value, reason=why, metrics=further, error=problem)
    return scores


def _values(batch: pa.RecordBatch | pa.Table, name: str, json_columns: frozenset[str]) -> list[Any]:
    return _from_json(batch, name) if name in json_columns else list(batch.column(name).to_pylist())


def _json_array(values: Sequence[Any]) -> pa.Array:
    texts = [None if value is None else msgspec.json.encode(value).decode() for value in values]
    return pa.array(texts, pa.string())


def _from_json(batch: pa.RecordBatch | pa.Table, name: str) -> list[Any]:
    values: list[Any] = []
    kind = file_format.json_kind(name) or object
    for text in batch.column(name).to_pylist():
        try:
            value = None if text is None else msgspec.json.decode(text)
            if not isinstance(value, kind | None):
                raise msgspec.DecodeError(f"not a JSON {'list' if kind is list else 'object'}")
            values.append(value)
        except (msgspec.DecodeError, RecursionError) as error:
            place = (
                f"completion {batch.column('sample_idx')[len(values)]}"
                if ("sample_idx" in batch.schema.names)
                else "a completion"
            )
            row = batch.column("row_id")[len(values)]
            raise FormatError(
                f"{place} of row {row}: {name} is no JSON that can be read: {error}"
            ) from error
    return values


_BUFFER_BYTES = 1 << 20
_LEVEL = 1
"""Of zstd. Level 3 takes half as long again for 1 % less (benchmarks/store.py)."""


def writer(file: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """A Parquet writer for rollouts."""
    # Ids plain: of running text, a dictionary makes the file 9 % larger and takes longer, and byte
    # stream split makes it 3 % larger and is unknown to readers from before 2024. Of logprobs it
    # saves 9 % of their bytes. Loss masks are runs, which a dictionary's indices are stored as.
    plain = [f"{name}.list.element" for name in file_format.ARRAY_COLUMNS]
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
            if held and (
                rows + len(piece) > file_format.ROW_GROUP_ROWS
                or tokens + size > file_format.ROW_GROUP_TOKENS
            ):
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
    if len(table) > 1 and (
        len(table) > file_format.ROW_GROUP_ROWS
        or count_tokens(table) > file_format.ROW_GROUP_TOKENS
    ):
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


def tables_of(rows: Iterable[CompletionRow], schema: pa.Schema) -> Iterator[pa.Table]:
    """Rows as tables that each fit a row group."""
    for held in in_row_groups(rows, _tokens_of):
        yield pa.Table.from_batches([to_record_batch(held, schema)])


def _tokens_of(row: CompletionRow) -> int:
    return row.num_tokens + (0 if row.prompt_ids is None else len(row.prompt_ids))


def in_row_groups(rows: Iterable[T], tokens_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Rows of any kind in lists that each fit a row group."""
    held: list[T] = []
    tokens = 0
    for row in rows:
        held.append(row)
        tokens += tokens_of(row)
        if len(held) >= file_format.ROW_GROUP_ROWS or tokens >= file_format.ROW_GROUP_TOKENS:
            yield held
            held, tokens = [], 0
    if held:
        yield held
