"""Reading a data set of prompts, whatever its format.

Invariant: what can be wrong with a data set is found when it is opened, before anything is paid
for, and each row keeps its number however often and in whichever order the set is read. Which files
of a folder are read, and in which order, follows from the folder alone; a folder that could be
meant in two ways is refused.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import PurePath, PurePosixPath
from typing import Any, TypeVar

import msgspec

from eval_protocol_rft._text import well_formed
from eval_protocol_rft.data.source._arrow import ArrowFile, ArrowSource
from eval_protocol_rft.data.source._columns import Source
from eval_protocol_rft.data.source._places import COMPRESSED, Place, places, plain_name
from eval_protocol_rft.data.source._text_files import TextFile, open_csv, open_json
from eval_protocol_rft.data.source._urls import PathOrGlob, SourceError, shown

FORMATS = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".json")
"""The last is read from folders only where nothing else is there: such files also describe data."""
_ARROW, _JSON = "Parquet or Arrow", "JSON"
_FAMILIES = {".parquet": _ARROW, ".arrow": _ARROW, ".csv": "CSV", ".tsv": "TSV"}
STATE_FILE = "state.json"
SPLITS_FILE = "dataset_dict.json"
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What Hugging Face's `datasets` takes for a split in the name of a file."""
T = TypeVar("T")
_OF_ROLLOUTS = {"data_idx", "sample_idx", "completion_ids"}


def open_source(data: PathOrGlob | Sequence[PathOrGlob]) -> Source:
    """Open a data set and look at all of it: content, number of rows, columns and their types.

    Args:
        data: a file (.parquet; .jsonl or .ndjson: an object per line; .json: an array of objects;
            .csv or .tsv: with a header, all values text; of text also .gz, .zst or .bz2), a folder
            of such files, a folder that `Dataset.save_to_disk` of Hugging Face wrote, a pattern
            such as `shards/*.jsonl`, or several of these, which are read one after the other. Each
            may be a URL of fsspec, such as `s3://bucket/x.parquet`, `https://host/x.jsonl` or
            `hf://datasets/owner/name`; what is behind it is copied to the temporary folder
            (TMPDIR) as long as the source is there. Files whose names begin with a dot or an
            underscore are passed over unless they are named.

    Raises:
        SourceError: it is nothing of this, cannot be read, or has no rows. In Parquet, damage
            inside a file shows when the rows are read.
        OSError: a file cannot be opened.
    """
    given = [data] if isinstance(data, str | os.PathLike) else list(data)
    if not given:
        raise SourceError("no data set is named")
    named = [place for each in given for place in places(each)]
    inputs: list[Place] = []
    watched: list[Place] = []
    for place in named:
        inputs += _files_of(place, watched) if place.is_folder() else [place]
    here = [os.path.realpath(place.name) if place.is_here else place.name for place in inputs]
    for name, count in Counter(here).items():
        if count > 1:
            twice = inputs[here.index(name)].shown
            raise SourceError(f"{twice} is named twice: its rows would be asked twice")
    families = {_family(place): place for place in inputs}
    if len(families) > 1:
        names = " and ".join(f"{place.path.name} ({name})" for name, place in families.items())
        raise SourceError(f"a data set is of one format, and here are several: {names}")
    for place in inputs:
        if len(inputs) > 1 or place.path.suffix == ".arrow":
            place.label = f"{well_formed(place.path.parent.name)}/{place.label}"
    of_folder = len(given) == 1 and len(named) == 1 and named[0].is_folder()
    name = named[0].path.name if of_folder else _common_name(inputs)
    [family] = families
    source = _opened(well_formed(name), family, inputs, watched)
    if source.num_rows == 0:
        raise SourceError(f"{', '.join(map(shown, given))}: no rows")
    if {column.name for column in source.columns} >= _OF_ROLLOUTS:
        raise SourceError(
            f"{', '.join(map(shown, given))}: there are rollouts in it, of which each completion "
            "would be asked as a row: name the data set alone (of rollouts, `ep-rft filter "
            "--prompts` writes it)"
        )
    return source


async def aopen_source(data: PathOrGlob | Sequence[PathOrGlob]) -> Source:
    """`open_source` in a thread that nobody waits for at the end: it may wait for a server."""
    result: Future[Source] = Future()
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(open_source(data))
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(result)


def _opened(name: str, family: str, inputs: list[Place], watched: list[Place]) -> Source:
    for place in (*watched, *inputs):
        try:
            place.take()
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise SourceError(
                f"{place.shown}: each compressed file is held open, and {len(inputs)} are more "
                "than a process may have: raise the limit (`ulimit -n`), or put files together"
            ) from error
    if family == _ARROW:
        return ArrowSource(name, [ArrowFile(place) for place in inputs], watched)
    files = [TextFile(place) for place in inputs]
    if family == _JSON:
        return open_json(name, files)
    return open_csv(name, files, delimiter="," if family == "CSV" else "\t")


def _family(place: Place) -> str:
    """What can be read as one data set."""
    suffix = plain_name(place.path).suffix.lower()
    packed = place.path.suffix.lower() in COMPRESSED
    if suffix not in (*FORMATS, ".arrow") or (packed and _FAMILIES.get(suffix) == _ARROW):
        raise SourceError(
            f"{place.shown}: not a format that can be read. There are {', '.join(FORMATS)}, of "
            f"text also {', '.join(COMPRESSED)}, a folder of such files, and a folder written by "
            "Dataset.save_to_disk; on a web server, a folder's name ends with a slash"
        )
    return _FAMILIES.get(suffix, _JSON)


def _common_name(inputs: list[Place]) -> str:
    """Of one file its own, without endings; of several that of the folder that has them all."""
    if len(inputs) == 1:
        return plain_name(inputs[0].path).stem
    parents = {str(place.path.parent) for place in inputs}
    absolute = all(parent.startswith("/") for parent in parents)
    common = os.path.commonpath(parents) if absolute or len(parents) == 1 else ""
    return PurePosixPath(common).name or "data"


def _files_of(folder: Place, watched: list[Place]) -> list[Place]:
    """The files of a folder: those that `Dataset.save_to_disk` wrote, else those of one format.
    What else has to stay as it is goes into `watched`.

    Raises:
        SourceError: the folder holds no data set, or several.
    """
    names = folder.files()
    if SPLITS_FILE in names:
        splits = _decoded(folder.child(SPLITS_FILE), dict[str, list[str]])["splits"]
        raise SourceError(
            f"{folder.shown} holds several splits: {', '.join(splits)}. Name the folder of one, "
            f"such as {folder.child(splits[0] if splits else 'train').shown}"
        )
    if STATE_FILE in names:
        state = folder.child(STATE_FILE)
        watched.append(state)
        return [folder.child(name) for name in _saved(folder, state, names)]
    return [folder.child(name) for name in _shards(folder, names)]


def _shards(folder: Place, names: list[str]) -> list[str]:
    """Those of one format, by name."""
    data = [name for name in names if _format(name) in FORMATS]
    if any(_format(name) != FORMATS[-1] for name in data):
        data = [name for name in data if _format(name) != FORMATS[-1]]
    here = [name for name in data if "/" not in name]
    deeper = [name for name in data if "/" in name]
    if here and deeper:
        raise SourceError(
            f"{folder.shown}: data files in the folder ({here[0]}) and in folders below "
            f"({deeper[0]}): name the folder that is meant"
        )
    parents = sorted({name.rpartition("/")[0] for name in deeper})
    if len(parents) == 1 and folder.is_repository:
        here = deeper
    if not here:
        found = f"; there are some in {folder.child(parents[0]).shown}" if parents else ""
        others = f" and {len(parents) - 1} other folders" if len(parents) > 1 else ""
        raise SourceError(
            f"{folder.shown}: neither data files in it ({', '.join(FORMATS)}) nor the {STATE_FILE} "
            f"of a saved Hugging Face data set{found}{others}"
        )
    for name in here:
        if _format(name) != _format(here[0]):
            pattern = folder.child("*" + PurePath(here[0]).suffix).shown
            raise SourceError(
                f"{folder.shown} holds files of two formats, such as {here[0]} and {name}: name "
                f"those that are meant, as '{pattern}'"
            )
    _refuse_splits(folder, here)
    return here


def _refuse_splits(folder: Place, names: list[str]) -> None:
    """Rows to train on and rows to test on are no one data set."""
    first = {split: name for name in reversed(names) for split in _splits_in(name)}
    if len(first) > 1:
        split, name = next(iter(sorted(first.items())))
        word = next(word for word in _words(name) if word in _SPLITS[split])
        pattern = name[: name.lower().rindex(word) + len(word)] + "*"
        raise SourceError(
            f"{folder.shown} holds several splits ({', '.join(sorted(first))}), which are no one "
            f"data set: name the files that are meant, as '{folder.child(pattern).shown}'"
        )


def _splits_in(name: str) -> list[str]:
    words = set(_words(name))
    return [split for split, names in _SPLITS.items() if words.intersection(names)]


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z]+", PurePosixPath(name).name.lower())


def _format(name: str) -> str:
    suffix = plain_name(PurePosixPath(name)).suffix.lower()
    return ".jsonl" if suffix == ".ndjson" else suffix


class _State(msgspec.Struct):
    """The part of state.json that says where the rows are."""

    data_files: list[dict[str, str]] = msgspec.field(name="_data_files")
    indices_data_files: list[Any] | None = msgspec.field(name="_indices_data_files", default=None)


def _decoded(place: Place, kind: type[T]) -> T:
    place.take()
    with place.open() as file:
        try:
            return msgspec.json.decode(file.read(), type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise SourceError(f"{place.shown}: {error}") from error


def _saved(folder: Place, state_file: Place, names: list[str]) -> list[str]:
    """The files that `Dataset.save_to_disk` wrote.

    Raises:
        SourceError: their list is damaged, or one is not there.
    """
    state = _decoded(state_file, _State)
    if state.indices_data_files:
        raise SourceError(
            f"{folder.shown} keeps a selection of its rows in a file of indices, as old versions "
            "of `datasets` did: load it and save it again"
        )
    if not state.data_files:
        raise SourceError(f"{state_file.shown} lists no data files")
    files = [file["filename"] for file in state.data_files]
    missing = [name for name in files if name not in names]
    if missing:
        raise SourceError(f"{folder.shown}: {STATE_FILE} lists {missing[0]}, which is not there")
    return files
