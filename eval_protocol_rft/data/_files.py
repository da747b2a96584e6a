"""Writing a whole file, in either format: rollouts, or the prompts behind them; and where a command
may write.

Invariant: a file appears under its name when it is complete and on disk, or not at all. What a
command reads is never what it writes, nothing is replaced unless asked for, and what would keep a
file from being written at the end is found at the start. Of the prompts, a data row comes out once,
with the columns that it had; what JSON cannot say is an error, not null.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eval_protocol_rft._durable import check_replaceable, link_target, replacing
from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.data import _jsonl as jsonl
from eval_protocol_rft.data._format import ORIGINAL_PREFIX, CompletionRow, FormatError, metadata_of
from eval_protocol_rft.data._jsonl import is_jsonl, metadata_path
from eval_protocol_rft.data._row_groups import tables_of, write_tables
from eval_protocol_rft.data.source._places import one_place
from eval_protocol_rft.data.source._urls import is_url, shown


def write_file(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write `tables`, which have `schema`, in the place of `path`; returns the number of rows.

    Raises:
        OSError: the file cannot be written; one that was there is as it was.
    """
    if is_jsonl(path):
        return jsonl.write_file(path, schema, tables)
    with replacing(path) as file:
        return write_tables(file, schema, tables)


def write_rows(
    path: str | os.PathLike[str], schema: pa.Schema, rows: Iterable[CompletionRow]
) -> int:
    """Write rows, those of a data row together and by `sample_idx`; returns their number."""
    return write_file(Path(path), schema, tables_of(rows, schema))


_RATE_FROM = 1_000_000
"""Bytes from which on they say what a row takes: less is what a file has without any."""
ROLLOUT_SUFFIXES = (".parquet", ".jsonl", ".ndjson")


class JobError(EvalProtocolRftError, ValueError):
    """A job on data cannot be done as it was asked: what it reads, where it writes, its options;
    the message says what to change."""


def output_path(output: str | os.PathLike[str]) -> Path:
    """Where to write.

    Raises:
        JobError: it is a URL.
    """
    if is_url(output):
        raise JobError(
            f"{shown(output)}: a URL, and what is written goes to this machine: name a file here, "
            "and copy it when it is done"
        )
    return Path(output)


def check_target(
    output: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    suffixes: Sequence[str],
    overwrite: bool,
) -> Path:
    """`output` as a path, if it may be written to.

    Raises:
        JobError: it is the source, is there already, has another extension, is a URL, or cannot
            be written.
    """
    path = output_path(output)
    if path.suffix not in suffixes:
        raise JobError(f"{path}: what to write there? Its name must end in {_listed(suffixes)}")
    with _as_target_error(path):
        if not is_url(source):
            check_not_read(path, [Path(one_place(source).name)])
        if path.exists() and not overwrite:
            raise JobError(
                f"{path} is there already; write elsewhere, or say --overwrite (overwrite=True)"
            )
        _check_writable(path)
    return path


def check_not_read(target: Path, sources: Iterable[Path]) -> None:
    """See that a command does not write over what it reads, whatever it may overwrite.

    Raises:
        JobError: it would.
    """
    if any(same_file(target, source) for source in sources):
        raise JobError(f"{target}: that is the file to be read; write to another one")


def check_rollout_file(path: Path, *, folders: Iterable[Path]) -> None:
    """Look whether `path` can become a rollout file, before work is put into it.

    Args:
        path: the file, which may be there.
        folders: of the jobs that make it.

    Raises:
        JobError: its name says no format or is too long, or its folder cannot be written.
    """
    if path.suffix not in ROLLOUT_SUFFIXES:
        raise JobError(f"{path}: name the output .parquet or .jsonl")
    with _as_target_error(path):
        _check_writable(path)
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                os.stat(folder)


def check_room(target: Path, size: int) -> None:
    """See that the disk has room to write `target` in `size` bytes beside what is there, where the
    disk can tell.

    Raises:
        JobError: it has not.
    """
    folder = link_target(target).absolute().parent
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < size:
        raise JobError(
            f"{target}: writing it takes {amount(size)}, and the disk of {folder} has "
            f"{amount(usage.free)} left. Make room first, or choose another output"
        )


def room_warning(target: Path, total: int, stored: int, size: int) -> str | None:
    """What to say where the disk will be full before a job is done, at the rate so far.

    Args:
        target: the file that the job makes.
        total: rows that it will have.
        stored: rows that are stored.
        size: bytes that these take.

    Returns:
        None where there is room, as far as the disk can tell, or the rate is not known yet. What is
        stored and the file stand side by side until the file is whole.
    """
    if size < _RATE_FROM or stored >= total:
        return None
    folder = link_target(target).absolute().parent
    usage = shutil.disk_usage(folder)
    whole = size / stored * total
    if not usage.total or usage.free >= 2 * whole - size:
        return None
    return (
        f"{target}: the disk will be full before the job is done: {stored:,} of {total:,} "
        f"completions take {amount(size)}, so {amount(2 * whole - size)} more are needed in the "
        f"end, and {folder} has {amount(usage.free)} left. Make room meanwhile; where the disk is "
        "full the job stops, what is stored is safe, and the same command goes on"
    )


def amount(size: float) -> str:
    """Bytes for people: `1.2 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def same_file(path: Path, other: Path) -> bool:
    """Whether both lead to one file."""
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.resolve() == other.resolve()


def _check_writable(path: Path) -> None:
    """See that `path`, and what goes with it, can be made and replaced."""
    if path.is_dir():
        raise JobError(f"{path}: there is a folder of that name")
    folder = link_target(path).absolute().parent
    if not folder.is_dir():
        raise JobError(f"{path}: there is no folder {folder}")
    check_replaceable(path)
    if is_jsonl(path):
        check_replaceable(metadata_path(path))


@contextlib.contextmanager
def _as_target_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = "" if error.filename is None else Path(os.fsdecode(error.filename)).name
        where = f" ({name})" if name not in ("", path.name) else ""
        raise JobError(f"{path}: cannot be written: {error.strerror or error}{where}") from error


def _listed(suffixes: Sequence[str]) -> str:
    *others, last = suffixes
    return f"{', '.join(others)} or {last}" if others else last


def original_columns(schema: pa.Schema) -> list[str]:
    """The columns of the data set, with their prefix.

    Raises:
        FormatError: there are none.
    """
    names = [name for name in schema.names if name.startswith(ORIGINAL_PREFIX)]
    if not names:
        raise FormatError(
            f"the file holds no columns {ORIGINAL_PREFIX}*: its rollouts did not come from a data "
            "set, so it has no prompts to give back"
        )
    return names


def write_prompts(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write one row of the data set for each data row in `tables`; returns their number.

    Args:
        path: JSON lines by its extension, in which columns of JSON text are the values that they
            stand for; else Parquet, in which they stay text.
        schema: of the rollout file.
        tables: rows of it, those of a data row together.

    Raises:
        FormatError: a value that is none in JSON.
    """
    names = original_columns(schema)
    fields = [schema.field(name) for name in names]
    plain = pa.schema([field.with_name(_stripped(field.name)) for field in fields])
    rows = 0
    with replacing(path) as file:
        if is_jsonl(path):
            known = frozenset(metadata_of(schema).json_columns)
            json_columns = [_stripped(name) for name in names if name in known]
            for table in _firsts(tables, names, plain):
                file.write(b"".join(_lines(table, json_columns)))
                rows += len(table)
        else:
            with pq.ParquetWriter(pa.PythonFile(file, mode="w"), plain) as target:
                for table in _firsts(tables, names, plain):
                    target.write_table(table)
                    rows += len(table)
    return rows


def _firsts(tables: Iterable[pa.Table], names: list[str], schema: pa.Schema) -> Iterator[pa.Table]:
    """The first row of each data row."""
    last = -1
    for table in tables:
        data_idx = table["data_idx"].to_numpy()
        first = np.flatnonzero(np.diff(data_idx, prepend=last))
        last = data_idx[-1]
        yield table.select(names).take(first).rename_columns(schema.names).cast(schema)


def _lines(table: pa.Table, json_columns: list[str]) -> Iterator[bytes]:
    for values in table.to_pylist():
        for name in json_columns:
            if values[name] is not None:
                values[name] = msgspec.json.decode(values[name])
        yield _json(values) + b"\n"


def _json(values: dict[str, Any]) -> bytes:
    # msgspec would write NaN as null; Python's encoder can refuse it.
    try:
        text = json.dumps(values, ensure_ascii=False, allow_nan=False, default=msgspec.to_builtins)
    except (TypeError, ValueError) as error:
        raise FormatError(
            f"a row of the data set cannot be a JSON line: {error}. Write .parquet instead; the "
            f"row begins {str(values)[:200]}"
        ) from error
    return text.encode()


def _stripped(name: str) -> str:
    return name.removeprefix(ORIGINAL_PREFIX)
