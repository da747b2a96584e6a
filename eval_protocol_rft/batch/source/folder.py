"""Data sets in folders: what `Dataset.save_to_disk` leaves, or Parquet files side by side; and
single Parquet files.

Invariant: which files are read, and in which order, follows from the folder alone; a folder that
could be meant in two ways is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from eval_protocol_rft.batch.source.arrow import BATCH_ROWS, ArrowFile, ArrowSource
from eval_protocol_rft.batch.source.files import FileState
from eval_protocol_rft.batch.source.types import SourceError

if TYPE_CHECKING:
    import pyarrow as pa

STATE_FILE = "state.json"
SPLITS_FILE = "dataset_dict.json"


def open_parquet(path: Path) -> ArrowSource:
    """Open a Parquet file.

    Raises:
        SourceError: it is not readable as Parquet, or has columns that cannot be read.
    """
    state = FileState.of(path)
    return ArrowSource(path.stem, [_parquet_file(path, path.name)], [state])


def open_folder(folder: Path) -> ArrowSource:
    """Open a folder that `Dataset.save_to_disk` wrote, or one of Parquet files, read by name.

    Raises:
        SourceError: it is neither or both, holds several splits, or its files do not fit together.
    """
    if (folder / SPLITS_FILE).is_file():
        raise SourceError(_name_a_split(folder))
    if (folder / STATE_FILE).is_file():
        return _open_saved(folder)
    paths = sorted(folder.glob("*.parquet"))
    deeper = sorted(folder.glob("*/**/*.parquet"))
    if paths and deeper:
        raise SourceError(
            f"{folder}: Parquet files in the folder ({paths[0].name}) and in folders below "
            f"({deeper[0].relative_to(folder)}): name the folder that is meant"
        )
    if not paths:
        found = f"; there are some in {deeper[0].parent}" if deeper else ""
        raise SourceError(
            f"{folder}: neither Parquet files in it nor the {STATE_FILE} of a saved Hugging Face "
            f"data set{found}"
        )
    states = [FileState.of(path) for path in paths]
    files = [_parquet_file(path, f"{folder.name}/{path.name}") for path in paths]
    return ArrowSource(folder.name, files, states)


class _DataFile(msgspec.Struct):
    filename: str


class _State(msgspec.Struct):
    """The part of state.json that says where the rows are."""

    data_files: list[_DataFile] = msgspec.field(name="_data_files")
    indices_data_files: list[_DataFile] | None = msgspec.field(
        name="_indices_data_files", default=None
    )


class _Splits(msgspec.Struct):
    splits: list[str]


def _name_a_split(folder: Path) -> str:
    try:
        splits = msgspec.json.decode((folder / SPLITS_FILE).read_bytes(), type=_Splits).splits
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{folder / SPLITS_FILE}: {error}") from error
    return (
        f"{folder} holds several splits: {', '.join(splits)}. Name the folder of one, such as "
        f"{folder / splits[0] if splits else folder / 'train'}"
    )


def _open_saved(folder: Path) -> ArrowSource:
    try:
        state = msgspec.json.decode((folder / STATE_FILE).read_bytes(), type=_State)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{folder / STATE_FILE}: {error}") from error
    if state.indices_data_files:
        raise SourceError(
            f"{folder} keeps a selection of its rows in a file of indices, as old versions of "
            "`datasets` did: load it and save it again"
        )
    if not state.data_files:
        raise SourceError(f"{folder / STATE_FILE} lists no data files")
    paths = [folder / file.filename for file in state.data_files]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise SourceError(f"{folder}: {STATE_FILE} lists {missing[0]}, which is not there")
    states = [FileState.of(path) for path in (folder / STATE_FILE, *paths)]
    return ArrowSource(folder.name, [_stream_file(folder, path) for path in paths], states)


def _parquet_file(path: Path, label: str) -> ArrowFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{label} cannot be read as Parquet: {error}") from error
    return ArrowFile(path, label=label, schema=schema, num_rows=num_rows, read=_parquet_batches)


def _parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=BATCH_ROWS)


def _stream_file(folder: Path, path: Path) -> ArrowFile:
    import pyarrow as pa

    label = f"{folder.name}/{path.name}"
    try:
        num_rows = sum(batch.num_rows for batch in _stream_batches(path))
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            schema = stream.schema
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{label} cannot be read as an Arrow stream: {error}") from error
    return ArrowFile(path, label=label, schema=schema, num_rows=num_rows, read=_stream_batches)


def _stream_batches(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        yield from stream
