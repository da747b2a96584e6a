"""Reading a data set of prompts, whatever its format.

Invariant: what can be wrong with a data set is found when it is opened, before anything is paid
for, and each row keeps its number however often and in whichever order the set is read.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from eval_protocol_rft.batch.source.arrow import ArrowFile, ArrowSource
from eval_protocol_rft.batch.source.csv import open_csv
from eval_protocol_rft.batch.source.files import FileState
from eval_protocol_rft.batch.source.folder import (
    is_hidden,
    is_saved,
    parquet_file,
    saved_files,
    shards,
)
from eval_protocol_rft.batch.source.json import open_json
from eval_protocol_rft.batch.source.prompt import (
    PromptKind,
    check_prompt,
    messages_in,
    prompt_column,
    tools_in,
    without_absent,
)
from eval_protocol_rft.batch.source.text import COMPRESSED, TextFile, plain_name
from eval_protocol_rft.batch.source.types import Source, SourceColumn, SourceError, SourceRow

__all__ = [
    "PromptKind",
    "Source",
    "SourceColumn",
    "SourceError",
    "SourceRow",
    "check_prompt",
    "messages_in",
    "open_source",
    "prompt_column",
    "tools_in",
    "without_absent",
]

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
