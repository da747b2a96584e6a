"""Data sets in folders: what `Dataset.save_to_disk` leaves, or files side by side; Parquet files.

Invariant: which files are read, and in which order, follows from the folder alone; a folder that
could be meant in two ways is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from eval_protocol_rft.batch.source.arrow import BATCH_ROWS, ArrowFile
from eval_protocol_rft.batch.source.files import FileState
from eval_protocol_rft.batch.source.text import plain_name
from eval_protocol_rft.batch.source.types import SourceError

if TYPE_CHECKING:
    import pyarrow as pa

STATE_FILE = "state.json"
SPLITS_FILE = "dataset_dict.json"


def parquet_file(path: Path, label: str) -> ArrowFile:
    """A Parquet file.

    Raises:
        SourceError: it is not readable as Parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{label} cannot be read as Parquet: {error}") from error
    return ArrowFile(path, label=label, schema=schema, num_rows=num_rows, read=_parquet_batches)


def is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote the folder.

    Raises:
        SourceError: it holds several splits.
    """
    if (folder / SPLITS_FILE).is_file():
        raise SourceError(_name_a_split(folder))
    return (folder / STATE_FILE).is_file()


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is nobody's data: names that begin with a dot or an underscore are
    of file systems (`._part.parquet` of a Mac) or of those who write (`_SUCCESS`), and no reader of
    shards takes them."""
    return path.name.startswith((".", "_"))


def shards(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files of a data set in `folder`, by name: those of one format, hidden ones passed over.

    Args:
        folder: what the user named.
        suffixes: of data files, in lower case, those that other files may have as well last: files
            of these count where there are no others.

    Raises:
        SourceError: there are none, files of several formats, or some in folders below as well.
    """
    visible = [path for path in _walk(folder) if plain_name(path).suffix.lower() in suffixes]
    if any(_format(path) != suffixes[-1] for path in visible):
        visible = [path for path in visible if _format(path) != suffixes[-1]]
    here = [path for path in visible if path.parent == folder]
    deeper = [path for path in visible if path.parent != folder]
    if here and deeper:
        raise SourceError(
            f"{folder}: data files in the folder ({here[0].name}) and in folders below "
            f"({deeper[0].relative_to(folder)}): name the folder that is meant"
        )
    if not here:
        found = f"; there are some in {deeper[0].parent}" if deeper else ""
        raise SourceError(
            f"{folder}: neither data files in it ({', '.join(suffixes)}) nor the {STATE_FILE} of a "
            f"saved Hugging Face data set{found}"
        )
    for path in here:
        if _format(path) != _format(here[0]):
            raise SourceError(
                f"{folder} holds files of two formats, such as {here[0].name} and {path.name}: "
                f"name those that are meant, as '{folder / ('*' + here[0].suffix)}'"
            )
    return here


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if is_hidden(path):
            continue
        if not path.is_dir():
            yield path
        elif not path.is_symlink():  # which may lead in circles
            yield from _walk(path)


def _format(path: Path) -> str:
    suffix = plain_name(path).suffix.lower()
    return ".jsonl" if suffix == ".ndjson" else suffix


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


def saved_files(folder: Path) -> tuple[list[ArrowFile], list[FileState]]:
    """The files that `Dataset.save_to_disk` wrote, and their state with that of their list.

    Raises:
        SourceError: the list or a file is damaged.
    """
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
    return [_stream_file(folder, path) for path in paths], states


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
