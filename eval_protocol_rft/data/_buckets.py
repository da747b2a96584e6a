"""Difficulty of prompts: bands of pass rates, or of percentiles of the mean reward, as a column of
the rollout file or as a file for each band.

Invariant: a data row is in one band, by all of its scored completions, and in none where no
completion has a reward. Data rows whose numbers are equal, up to rounding, are in the same band.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eval_protocol_rft._options import Flag, check_options
from eval_protocol_rft._statistics import equal
from eval_protocol_rft.data import _files as files
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.data._format import (
    EPISODE_COLUMNS,
    FIXED_COLUMNS,
    ORIGINAL_PREFIX,
    REWARD_PREFIX,
)
from eval_protocol_rft.data._progress import Reading
from eval_protocol_rft.data._stats import numbers_of_groups, read_numbers

_NONE = -1
"""The band of a data row without a reward."""
_ROUNDING = 1e-9
"""What lies so little below an edge lies on it: three of nine are 33.3 percent."""
_HIGHEST = {"pass-rate": 1.0, "percentile": 100.0}


def parse_names(text: str) -> tuple[str, ...]:
    """Names with commas between them.

    Raises:
        JobError: one is empty.
    """
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise JobError(f"{text!r}: names are missing between the commas")
    return names


def parse_edges(text: str) -> tuple[float, ...]:
    """Numbers with commas between them.

    Raises:
        JobError: they are no numbers.
    """
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise JobError(f"{text!r}: write numbers with commas between them: 0.25,0.75") from None


_NAMES = Flag(metavar="NAME,...", parse=parse_names, unset="hard,medium,easy")


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketRules:
    """What the bands of difficulty are."""

    by: Annotated[Literal["pass-rate", "percentile"], Flag("--bucketing-strategy")] = "pass-rate"
    """What makes a prompt hard: few of its completions pass, or its mean reward is low beside
    those of the others.

    The percentile of a mean reward is the share of lower ones and half of the equal ones."""
    names: Annotated[Sequence[str] | None, _NAMES] = None
    """Of the bands, the hardest first."""
    edges: Annotated[
        Sequence[float] | None,
        Flag(metavar="NUMBER,...", parse=parse_edges, unset="equal parts of the range"),
    ] = None
    """Where a band ends and the next one begins: pass rates in [0, 1], or percentiles in [0, 100].

    What lies on an edge is in the easier band."""
    reward: Annotated[str | None, Flag(unset="the main one")] = None
    """Name of a further reward."""
    pass_threshold: Annotated[float, Flag()] = 1.0
    """Reward from which on a completion counts as passed."""

    def __post_init__(self) -> None:
        check_options(self, JobError)
        names, edges, most = self.bands, self.limits, _HIGHEST[self.by]
        if len(set(names)) < len(names):
            raise JobError(f"names {','.join(names)}: one stands there twice")
        if len(edges) != len(names) - 1:
            raise JobError(
                f"{len(names)} bands ({', '.join(names)}) have {len(names) - 1} edges between them,"
                f" not {len(edges)}"
            )
        rising = all(low < high for low, high in pairwise((0.0, *edges)))
        if not rising or (edges and edges[-1] > most):
            raise JobError(
                f"edges {', '.join(f'{edge:g}' for edge in edges)}: they must rise, above 0 and up "
                f"to {most:g} (by {self.by})"
            )

    @property
    def bands(self) -> tuple[str, ...]:
        """Their names, the hardest first."""
        return ("hard", "medium", "easy") if self.names is None else tuple(self.names)

    @property
    def limits(self) -> tuple[float, ...]:
        """The edges between them."""
        if self.edges is not None:
            return tuple(self.edges)
        number = len(self.bands)
        return tuple(_HIGHEST[self.by] * i / number for i in range(1, number))


def percentiles(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """[P] of mean rewards, in [0, 100]: the share of lower ones and half of the equal ones, itself
    among them; NaN where there is none."""
    there = np.flatnonzero(~np.isnan(means))
    order = there[np.argsort(means[there], kind="stable")]
    ordered = means[order]
    ranks = np.full(len(means), np.nan)
    if len(ordered):
        starts = np.flatnonzero(np.append(True, ~equal(ordered[:-1], ordered[1:])))
        sizes = np.diff(np.append(starts, len(ordered)))
        ranks[order] = np.repeat((starts + sizes / 2) / len(ordered) * 100, sizes)
    return ranks


@dataclass(frozen=True, slots=True)
class Bucket:
    """One band."""

    name: str
    prompts: int
    completions: int
    low: float | None
    """The least pass rate, or mean reward, in it; None: it is empty."""
    high: float | None
    path: Path | None
    """Where it was written to; None: nowhere."""


@dataclass(frozen=True, slots=True)
class BucketSummary:
    """What became of the data rows of a file."""

    buckets: tuple[Bucket, ...]
    """The hardest first."""
    unscored: int
    """Data rows without a reward, which are in no band."""
    finished: bool
    """False where the file's job is not: it may yet have more."""


def bucket_rollouts(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    rules: BucketRules | None = None,
    *,
    split: Annotated[bool, Flag()] = False,
    only: Annotated[
        Sequence[str] | None, Flag(metavar="NAME,...", parse=parse_names, unset="all")
    ] = None,
    prompts: Annotated[bool, Flag()] = False,
    column: Annotated[str, Flag()] = "difficulty",
    overwrite: Annotated[bool, Flag()] = False,
    progress: bool | None = None,
) -> BucketSummary:
    """Write a rollout file, or the data set's own rows, with the band that each prompt is in.

    Args:
        source: the file, or that of an unfinished job.
        output: .parquet or .jsonl.
        rules: what the bands are.
        split: write a file for each band, OUTPUT-NAME.
        only: write these bands alone.
        prompts: write the data set's own rows, once each.
        column: the column's name.
        overwrite: replace an output that is there.
        progress: show a bar where it takes long; None: where stderr is a terminal.

    Raises:
        FormatError: no rollout file, or a broken one; no such reward; no columns of a data set.
        JobError: no completion has a reward; nothing is in these bands; the column is there for
            something else; the output is the source, exists already, or has another extension.
    """
    rules = rules or BucketRules()
    if unknown := [name for name in only or () if name not in rules.bands]:
        raise JobError(f"no band is called {unknown[0]!r}: there are {', '.join(rules.bands)}")
    path = files.output_path(output)
    targets = {
        name: path.with_name(f"{path.stem}-{name}{path.suffix}") if split else path
        for name in rules.bands
        if only is None or name in only
    }
    for target in dict.fromkeys(targets.values()):
        files.check_target(target, source, suffixes=files.ROLLOUT_SUFFIXES, overwrite=overwrite)
    dataset = RolloutDataset(source)
    reward = dataset.reward_column(rules.reward)
    schema, stored = _schema_with(dataset, column, prompts=prompts)
    with Reading("buckets", dataset.rows_about, show=progress) as reading:
        needed = ["data_idx", "sample_idx", "error", "truncated", reward]
        rows, _ = read_numbers(reading(dataset.tables(needed)), reward, where=dataset.where)
        groups = numbers_of_groups(rows, rules.pass_threshold)
        values = groups["pass_rate" if rules.by == "pass-rate" else "mean_reward"]
        scored = groups["num_scored"] > 0
        if not scored.any():
            raise JobError(
                f"{dataset.where}: no completion has a reward in the column {reward!r}. Score the "
                "file first, with `ep-rft score`"
            )
        measure = (
            values if rules.by == "pass-rate" else percentiles(np.where(scored, values, np.nan))
        )
        band = np.searchsorted(np.array(rules.limits) - _ROUNDING, measure, side="right")
        band = np.where(scored, band, _NONE)
        sizes = groups["num_completions"].astype(np.int64)
        of_rows = np.repeat(band, sizes)
        written: dict[str, Path] = {}
        for target in dict.fromkeys(targets.values()):
            names = [name for name, path in targets.items() if path == target]
            codes = [rules.bands.index(name) for name in names]
            everything = only is None and not split
            keep = np.isin(of_rows, codes) | everything
            if not keep.any():
                continue
            tables = _with_bands(
                reading(dataset.tables()), schema, stored, of_rows, keep, rules.bands
            )
            if prompts:
                files.write_prompts(target, schema, tables)
            else:
                files.write_file(target, schema, tables)
            written |= dict.fromkeys(names, target)
    if not written:
        raise JobError(f"no prompt is {' or '.join(targets)}, so nothing was written")
    return BucketSummary(
        tuple(
            _bucket(name, values[band == i], sizes[band == i], written.get(name))
            for i, name in enumerate(rules.bands)
        ),
        unscored=int((~scored).sum()),
        finished=dataset.finished,
    )


def _bucket(name: str, values: NDArray[Any], sizes: NDArray[np.int64], path: Path | None) -> Bucket:
    some = len(values) > 0
    return Bucket(
        name,
        prompts=len(values),
        completions=int(sizes.sum()),
        low=float(values.min()) if some else None,
        high=float(values.max()) if some else None,
        path=path if some else None,
    )


def _schema_with(dataset: RolloutDataset, column: str, *, prompts: bool) -> tuple[pa.Schema, str]:
    """The schema with the column, and the name that it has there.

    Raises:
        JobError: a column of that name is something else.
    """
    stored = ORIGINAL_PREFIX + column if prompts else column
    taken = prompts and stored in dataset.schema.names
    if column in FIXED_COLUMNS or column in EPISODE_COLUMNS:
        taken = True
    if not prompts and column.startswith((ORIGINAL_PREFIX, REWARD_PREFIX)):
        taken = True
    if taken or not column:
        raise JobError(
            f"{dataset.where}: a column {column!r} is something else there: choose another name "
            "for the band's, with --column"
        )
    if prompts:
        files.original_columns(dataset.schema)
    schema = dataset.schema
    if stored in schema.names:  # of an earlier call
        schema = schema.remove(schema.get_field_index(stored))
    return schema.append(pa.field(stored, pa.string())), stored


def _with_bands(
    tables: Iterable[pa.Table],
    schema: pa.Schema,
    stored: str,
    of_rows: NDArray[np.int64],
    keep: NDArray[np.bool_],
    names: Sequence[str],
) -> Iterator[pa.Table]:
    """What is kept of tables, with the names of the bands; none of them empty."""
    place = 0
    words = pa.array(names, pa.string())
    for table in tables:
        part = slice(place, place + len(table))
        place += len(table)
        if keep[part].any():
            codes = of_rows[part]
            bands = words.take(pa.array(codes, mask=codes == _NONE))
            columns = [
                bands if field.name == stored else table.column(field.name) for field in schema
            ]
            yield pa.Table.from_arrays(columns, schema=schema).filter(pa.array(keep[part]))
