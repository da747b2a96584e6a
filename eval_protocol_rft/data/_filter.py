"""Fewer rollouts: a file in, the completions or prompts worth keeping out.

Invariant: every completion of the file is kept or counted under one reason. The file read is never
the file written; what is written appears whole or not at all. Of the prompts behind rollouts, a
data row comes out once, with the columns that it had, under their names; what JSON cannot say is an
error, not null.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eval_protocol_rft._durable import replacing
from eval_protocol_rft._options import Flag
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import JobError, check_target, write_file
from eval_protocol_rft.data._filter_rules import (
    FilterRules,
    FilterSummary,
    decide,
    decision_columns,
)
from eval_protocol_rft.data._progress import Reading
from eval_protocol_rft.data._sql import rows_where
from eval_protocol_rft.data.rollouts._format import ORIGINAL_PREFIX, FormatError, metadata_of
from eval_protocol_rft.data.rollouts._jsonl import is_jsonl

Flags = NDArray[np.bool_]

_SUFFIXES = (".parquet", ".jsonl", ".ndjson")


def filter_rollouts(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    rules: FilterRules,
    *,
    prompts: Annotated[bool, Flag()] = False,
    overwrite: Annotated[bool, Flag()] = False,
    progress: bool | None = None,
) -> FilterSummary:
    """Write what the rules keep of a rollout file.

    Args:
        source: the file, or that of an unfinished job.
        output: .parquet or .jsonl. All columns and the file's metadata stay as they are.
        rules: what to keep.
        prompts: write the data set's own rows of what is left, once each.
        overwrite: replace an output that is there.
        progress: show a bar where it takes long; None: where stderr is a terminal.

    Raises:
        FormatError: no rollout file, or a broken one; no such reward; no columns of a data set.
        JobError: a rule on rewards, and the file has none.
        MissingPackageError: `where` is asked for, and DuckDB is not installed.
        JobError: nothing is kept.
        QueryError: `where` is no expression, or fails on a row.
        JobError: the output is the source, exists already, or has another extension.
    """
    target = check_target(output, source, suffixes=_SUFFIXES, overwrite=overwrite)
    dataset = RolloutDataset(source)
    reward = dataset.reward_column(rules.reward)
    if prompts:
        original_columns(dataset.schema)
    with Reading("filter", dataset.rows_about, show=progress) as reading:
        asked = None
        if rules.where is not None:
            asked = functools.partial(
                rows_where, dataset, rules.where, reading, reward, rules.pass_threshold
            )
        needed = [c for c in decision_columns(rules, reward) if c in dataset.schema.names]
        tables = reading(dataset.tables(needed))
        codes, summary = decide(tables, rules, reward, where=dataset.where, asked=asked)
        if rules.on_rewards and not summary.scored:
            raise JobError(
                f"{dataset.where}: a rule asks for rewards, and no completion has one in the "
                f"column {reward!r}. Score the file first, with `ep-rft score`"
            )
        if not summary.kept:
            counts = ", ".join(f"{reason} {count}" for reason, count in summary.dropped.items())
            raise JobError(
                f"nothing is left of {summary.completions} completions, so nothing was written. "
                f"Dropped: {counts or 'there were none'}"
            )
        kept = _kept(reading(dataset.tables()), codes == 0)
        if prompts:
            write_prompts(target, dataset.schema, kept)
        else:
            write_file(target, dataset.schema, kept)
    return replace(summary, finished=dataset.finished)


def _kept(tables: Iterable[pa.Table], keep: Flags) -> Iterator[pa.Table]:
    """What is left of tables, in tables that are not empty."""
    place = 0
    for table in tables:
        part = keep[place : place + len(table)]
        place += len(table)
        if part.all():
            yield table
        elif part.any():
            yield table.filter(pa.array(part))


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
