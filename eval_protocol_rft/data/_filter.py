"""Fewer rollouts: a file in, the completions or prompts worth keeping out.

Invariant: every completion of the file is kept or counted under one reason. The file read is never
the file written; what is written appears whole or not at all.

The prompts behind rollouts, as rows of the data set that they came from.

Invariant: a data row comes out once, with the columns that it had, under their names; what JSON
cannot say is an error, not null.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eval_protocol_rft._durable import replacing
from eval_protocol_rft._options import Flag
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import check_target, write_file
from eval_protocol_rft.data._filter_rules import (
    KEPT,
    REASONS,
    Band,
    FilterRules,
    FilterRulesError,
    Survey,
    decide,
    survey,
    survey_columns,
)
from eval_protocol_rft.data._group_values import chosen_reward, whole_groups, with_rewards
from eval_protocol_rft.data._progress import Reading
from eval_protocol_rft.data.rollouts._format import ORIGINAL_PREFIX, FormatError, metadata_of
from eval_protocol_rft.data.rollouts._jsonl import is_jsonl


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
        tables: rows of it, whole data rows each.

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
    for table in tables:
        data_idx = np.asarray(table.column("data_idx"))
        first = np.flatnonzero(np.append(True, data_idx[1:] != data_idx[:-1]))
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


_SUFFIXES = (".parquet", ".jsonl", ".ndjson")


class NothingLeftError(ValueError):
    """The rules leave nothing, so nothing was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterSummary:
    """What became of the completions of a file. `kept` and `dropped` add up to `completions`."""

    completions: int
    kept: int
    dropped: dict[str, int]
    """Reason (see `REASONS`) -> completions, in that order."""
    groups: int
    """Data rows."""
    groups_kept: int
    """Those of which something is kept."""
    finished: bool = True
    """False where the file's job is not: it may yet have more."""
    mean_band: Band | None
    """The mean rewards that `reward_percentile` came to."""


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
        rules: what to keep. Where one asks about the whole file it is read twice.
        prompts: write the data set's own rows of what is left, once each.
        overwrite: replace an output that is there.
        progress: show a bar where it takes long; None: where stderr is a terminal.

    Raises:
        FormatError: no rollout file, or a broken one; no such reward; no columns of a data set.
        FilterRulesError: a rule on rewards, and the file has none.
        NothingLeftError: nothing is kept.
        TargetError: the output is the source, exists already, or has another extension.
    """
    target = check_target(output, source, suffixes=_SUFFIXES, overwrite=overwrite)
    dataset = RolloutDataset(source)
    reward = chosen_reward(dataset, rules.reward)
    if prompts:
        original_columns(dataset.schema)
    found = Survey(0, None, frozenset())
    with Reading("filter", dataset.rows_about, show=progress) as reading:
        if rules.on_rewards or rules.dedupe_prompts:
            tables = reading(dataset.tables(survey_columns(rules, reward)))
            found = survey(_groups(tables, reward, str(source)), rules, reward)
            if rules.on_rewards and not found.scored:
                raise FilterRulesError(
                    f"{source}: a rule asks for rewards, and no completion has one in the column "
                    f"{reward!r}. Score the file first, with `ep-rft score`"
                )
        run = FilterRun(rules, found, reward)
        tables = run.kept(_groups(reading(dataset.tables()), reward, str(source)))
        if prompts:
            write_prompts(target, dataset.schema, tables)
        else:
            write_file(target, dataset.schema, tables)
    return replace(run.summary(), finished=dataset.finished)


def _groups(tables: Iterable[pa.Table], reward: str, where: str) -> Iterator[pa.Table]:
    return whole_groups(with_rewards(tables, reward, where=where), where=where)


class FilterRun:
    """One pass over whole data rows, with its counts. Reads and writes nothing."""

    def __init__(self, rules: FilterRules, found: Survey, reward: str) -> None:
        self._rules = rules
        self._found = found
        self._reward = reward
        self._codes = np.zeros(len(REASONS) + 1, np.int64)
        self._groups = self._groups_kept = 0

    def kept(self, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """What is left of tables of whole data rows, in tables that are not empty.

        Raises:
            NothingLeftError: after the last table, if nothing is.
        """
        for table in tables:
            codes = decide(table, self._rules, self._found, self._reward)
            keep = codes == KEPT
            data_idx = np.asarray(table.column("data_idx"))
            self._codes += np.bincount(codes, minlength=len(self._codes))
            self._groups += len(np.unique(data_idx))
            self._groups_kept += len(np.unique(data_idx[keep]))
            if keep.all():
                yield table
            elif keep.any():
                yield table.filter(pa.array(keep))
        summary = self.summary()
        if not summary.kept:
            counts = ", ".join(f"{reason} {count}" for reason, count in summary.dropped.items())
            raise NothingLeftError(
                f"nothing is left of {summary.completions} completions, so nothing was written. "
                f"Dropped: {counts or 'there were none'}"
            )

    def summary(self) -> FilterSummary:
        """The counts so far."""
        kept, *dropped = self._codes.tolist()
        return FilterSummary(
            completions=kept + sum(dropped),
            kept=kept,
            dropped={
                reason: count for reason, count in zip(REASONS, dropped, strict=True) if count
            },
            groups=self._groups,
            groups_kept=self._groups_kept,
            mean_band=self._found.mean_band,
        )
