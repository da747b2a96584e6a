"""`convert`: from one file to another.

Invariant: the source is only read, and the target appears when it is complete, or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa

from eval_protocol_rft._options import Flag
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import JobError, check_target, write_file
from eval_protocol_rft.data._progress import Reading
from eval_protocol_rft.data.conversion import _ep as ep
from eval_protocol_rft.data.conversion import _trl as trl
from eval_protocol_rft.data.conversion import _verl as verl
from eval_protocol_rft.data.conversion._types import (
    ConvertSummary,
    Format,
    Rollouts,
    Written,
    detect_format,
)
from eval_protocol_rft.data.rollouts._checking import in_order, with_token_data
from eval_protocol_rft.data.rollouts._jsonl import METADATA_SUFFIX, count_lines
from eval_protocol_rft.data.source._places import one_place
from eval_protocol_rft.data.source._urls import shown

_ENDINGS: dict[Format, tuple[str, ...]] = {
    "rollouts": (".parquet", ".jsonl", ".ndjson"),
    "ep": (".jsonl",),
    "verl": (".parquet", ".json"),
    "trl": (".parquet", ".jsonl", ".json"),
}
"""What the readers of a format take. verl reads JSON lines, from files called .json alone."""


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    from_format: Annotated[Literal["auto"] | Format | None, Flag("--from", only=True)] = "auto",
    to_format: Annotated[Format, Flag("--to", only=True)] = "rollouts",
    drop_failed_rows: Annotated[bool, Flag()] = False,
    data_source: Annotated[str | None, Flag(unset="the data set's name")] = None,
    overwrite: Annotated[bool, Flag()] = False,
    progress: bool | None = None,
) -> ConvertSummary:
    """Convert `source` to `target`, in constant memory.

    Args:
        source: a rollout file (Parquet or JSON lines), rows of Eval Protocol (JSON lines), or
            Parquet for verl or TRL that this function wrote; also compressed lines, or a URL.
        target: the file to write; its ending says Parquet or JSON lines.
        from_format: format of the first file; auto: by its content.
        to_format: format of the second file.
        drop_failed_rows: leave out Eval Protocol rows without a rollout, instead of refusing them.
        data_source: for verl: what it chooses its reward function by.
        overwrite: replace an output that is there.
        progress: show a bar where it takes long; None: where stderr is a terminal.

    Raises:
        JobError: the file cannot be converted;
            the target must not be written to.
        FormatError: the rollout file is broken.
        TrainingDataError: a line is no row of Eval Protocol.
        OSError: a file cannot be read or written.
    """
    output = check_target(target, source, suffixes=_ENDINGS[to_format], overwrite=overwrite)
    if data_source is not None and to_format != "verl":
        raise JobError("data_source is verl's: convert to verl, or leave it out")
    with one_place(source).here(METADATA_SUFFIX) as path:
        if from_format is None or from_format == "auto":
            from_format = detect_format(path)
        found: Format = from_format
        with Reading("convert", lambda: _rows_about(path, found), show=progress) as reading:
            rollouts = _checked(
                _read(path, found, drop_failed_rows=drop_failed_rows, reading=reading)
            )
            if to_format == "ep":
                data_rows, completions, notes = ep.write(rollouts, output)
            elif to_format == "verl":
                data_rows, completions, notes = verl.write(
                    rollouts, output, data_source=data_source
                )
            elif to_format == "trl":
                data_rows, completions, notes = trl.write(rollouts, output)
            else:
                data_rows, completions, notes = _write_rollouts(rollouts, output)
    return ConvertSummary(
        source=shown(source),
        target=output,
        from_format=found,
        to_format=to_format,
        data_rows=data_rows,
        completions=completions,
        notes=(*rollouts.notes, *notes),
    )


def _read(path: Path, found: Format, *, drop_failed_rows: bool, reading: Reading) -> Rollouts:
    if found == "ep":
        return ep.read(path, drop_failed_rows=drop_failed_rows, reading=reading)
    if found == "verl":
        rollouts = verl.read(path)
    elif found == "trl":
        rollouts = trl.read(path)
    else:
        data = RolloutDataset(path)
        unfinished = () if data.finished else ("the job of this file is not finished",)
        rollouts = Rollouts(path, data.schema, data.tables, unfinished)
    return replace(rollouts, read=lambda: reading(rollouts.read()))


def _rows_about(path: Path, found: Format) -> int | None:
    """What `_read` counts: completions, or rows of Eval Protocol."""
    if found == "ep":
        return count_lines(path)
    return RolloutDataset(path).rows_about() if found == "rollouts" else None


def _checked(rollouts: Rollouts) -> Rollouts:
    """The same, but what cannot be trained on is an error where it is read."""
    where = str(rollouts.path)
    return replace(rollouts, read=lambda: with_token_data(in_order(rollouts.read(), where), where))


def _write_rollouts(rollouts: Rollouts, target: Path) -> Written:
    data_rows, last = 0, None

    def counted() -> Iterator[pa.Table]:
        nonlocal data_rows, last
        for table in rollouts.read():
            numbers = table.column("data_idx").to_numpy()  # those of a data row stand together
            data_rows += int(np.count_nonzero(np.diff(numbers))) + int(numbers[0] != last)
            last = int(numbers[-1])
            yield table

    completions = write_file(target, rollouts.schema, counted())
    return data_rows, completions, ()
