"""Reading a data set of prompts, whatever its format.

Invariant: what can be wrong with a data set is found when it is opened, before anything is paid
for, and each row keeps its number however often and in whichever order the set is read.

Data sets in folders: what `Dataset.save_to_disk` leaves, or files side by side; Parquet files.

Invariant: which files are read, and in which order, follows from the folder alone; a folder that
could be meant in two ways is refused.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from eval_protocol_rft.data.source._arrow import BATCH_ROWS, ArrowFile, ArrowSource
from eval_protocol_rft.data.source._json import open_json
from eval_protocol_rft.data.source._text import COMPRESSED, TextFile, open_csv, plain_name
from eval_protocol_rft.data.source._types import (
    FileState,
    Source,
    SourceError,
)

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


FORMATS = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".json")
"""The last is read from folders only where nothing else is there: such files also describe data."""
_ARROW, _JSON = "Parquet or Arrow", "JSON"
_FAMILIES = {".parquet": _ARROW, ".csv": "CSV", ".tsv": "TSV"}

PathOrGlob = str | os.PathLike[str]


def open_source(data: PathOrGlob | Sequence[PathOrGlob]) -> Source:
    """Open a data set and look at all of it: content, number of rows, columns and their types.

    Args:
        data: a file (.parquet; .jsonl or .ndjson: an object per line; .json: an array of objects;
            .csv or .tsv: with a header, all values text; of text also .gz or .zst), a folder of
            such files, a folder that `Dataset.save_to_disk` of Hugging Face wrote, a pattern such
            as `shards/*.jsonl`, or several of these, which are read one after the other. Files
            whose names begin with a dot or an underscore are passed over unless they are named.

    Raises:
        SourceError: it is nothing of this, cannot be read, or has no rows. In Parquet, damage
            inside a file shows when the rows are read.
        OSError: a file cannot be opened.
    """
    given = [data] if isinstance(data, str | os.PathLike) else list(data)
    if not given:
        raise SourceError("no data set is named")
    # Only the absolute path of "." has the folder's name.
    inputs = [path for each in given for path in _paths(Path(os.path.abspath(each)))]
    for path, count in Counter(inputs).items():
        if count > 1:
            raise SourceError(f"{path} is named twice: its rows would be asked twice")
    families = {_family(path): path for path in inputs}
    if len(families) > 1:
        names = " and ".join(f"{path.name} ({family})" for family, path in families.items())
        raise SourceError(f"a data set is of one format, and here are several: {names}")
    name = _name(given, inputs)
    [family] = families
    if family == _ARROW:
        source: Source = _arrow_source(name, inputs)
    else:
        files = [TextFile(path, _label(path, inputs)) for path in inputs]
        if family == _JSON:
            source = open_json(name, files)
        else:
            source = open_csv(name, files, delimiter="," if family == "CSV" else "\t")
    if source.num_rows == 0:
        raise SourceError(f"{', '.join(map(str, given))}: no rows")
    return source


def _paths(given: Path) -> list[Path]:
    """The files that are meant; a folder that `datasets` saved stands for its own."""
    if given.is_dir():
        return [given] if is_saved(given) else shards(given, FORMATS)
    if given.exists():
        return [given]
    pattern = str(given)
    if not glob.has_magic(pattern):
        raise SourceError(f"{given}: no such file or folder")
    found = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    if not given.name.startswith("_"):
        found = [path for path in found if not is_hidden(path)]
    if not found:
        raise SourceError(f"{given}: no file has such a name")
    return [path for each in found for path in (_paths(each) if each.is_dir() else [each])]


def _family(path: Path) -> str:
    """What can be read as one data set."""
    if path.is_dir():
        return _ARROW
    suffix = plain_name(path).suffix.lower()
    if suffix not in FORMATS or (suffix == ".parquet" and path.suffix.lower() in COMPRESSED):
        raise SourceError(
            f"{path}: not a format that can be read. There are {', '.join(FORMATS)}, of text also "
            f"{' or '.join(COMPRESSED)}, a folder of such files, and a folder written by "
            "Dataset.save_to_disk"
        )
    return _FAMILIES.get(suffix, _JSON)


def _name(given: list[PathOrGlob], inputs: list[Path]) -> str:
    """Of one file its own, without endings; of several that of the folder that has them all."""
    if len(given) == 1 and Path(given[0]).is_dir():
        return Path(os.path.abspath(given[0])).name
    if len(inputs) == 1:
        return plain_name(inputs[0]).stem
    return Path(os.path.commonpath([path.parent for path in inputs])).name or "data"


def _label(path: Path, inputs: list[Path]) -> str:
    return path.name if len(inputs) == 1 else f"{path.parent.name}/{path.name}"


def _arrow_source(name: str, inputs: list[Path]) -> ArrowSource:
    files: list[ArrowFile] = []
    states: list[FileState] = []
    for path in inputs:
        if path.is_dir():
            saved, saved_states = saved_files(path)
            files += saved
            states += saved_states
        else:
            states.append(FileState.of(path))
            files.append(parquet_file(path, _label(path, inputs)))
    return ArrowSource(name, files, states)
