"""Which format a file has, by what is in it.

Invariant: a file is of a format only if nothing else would look like it; else the user is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from eval_protocol_rft.batch.conversion.types import ConvertError, Format
from eval_protocol_rft.batch.rollouts.format import METADATA_KEY
from eval_protocol_rft.batch.rollouts.jsonl import metadata_path
from eval_protocol_rft.batch.store.parts import parts_folder

_MARKS: Mapping[Format, frozenset[str]] = {
    "ep": frozenset({"messages", "execution_metadata"}),
    "rollouts": frozenset({"data_idx", "sample_idx", "completion_ids", "response"}),
    "verl": frozenset({"data_source", "prompt"}),
    "trl": frozenset({"prompt", "completion"}),
}
"""Columns that a format has, the more telling formats first."""
_PARQUET = b"PAR1"


def is_parquet(path: Path) -> bool:
    """Whether the file begins as Parquet does."""
    with path.open("rb") as file:
        return file.read(len(_PARQUET)) == _PARQUET


def read_parquet_schema(path: Path) -> pa.Schema:
    """The schema of any Parquet file.

    Raises:
        ConvertError: it is not a whole one.
    """
    try:
        return pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConvertError(f"{path}: not a whole Parquet file: {error}") from error


def detect_format(path: Path) -> Format:
    """The format of a file, or of the unfinished job that is to write it.

    Raises:
        ConvertError: there is no such file, or it may be anything.
    """
    if path.is_dir():
        raise ConvertError(f"{path}: a folder; name the file in it")
    if not path.is_file():
        if parts_folder(path).is_dir():
            return "rollouts"
        raise ConvertError(f"{path}: no such file")
    if is_parquet(path):
        schema = read_parquet_schema(path)
        if METADATA_KEY in (schema.metadata or {}):
            return "rollouts"
        return _by_columns(path, schema.names)
    if metadata_path(path).is_file():
        return "rollouts"
    return _by_columns(path, list(_first_line(path)))


def _by_columns(path: Path, names: Sequence[str]) -> Format:
    for name, marks in _MARKS.items():
        if marks <= set(names):
            return name
    raise ConvertError(
        f"{path}: which format is this? It has {', '.join(names) or 'no columns'}; say --from "
        f"{', '.join(_MARKS)}"
    )


def _first_line(path: Path) -> dict[str, Any]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                values: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ConvertError(
                    f"{path}:{number}: neither Parquet nor JSON lines: {error}"
                ) from error
            return values
    raise ConvertError(f"{path}: an empty file")
